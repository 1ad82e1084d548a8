"""Preprocessing of image processors: the same pixels as transformers makes, or a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import transformers as tf
from PIL import Image

from planish.deploy.pixels import to_input
from planish.errors import PlanishError
from planish.models.huggingface_images import huggingface_preprocessing, preprocessing_of

SQUARE, CROP = {"height": 40, "width": 40}, {"height": 32, "width": 32}
CASES = {
    "vit": ("ViT", {"size": {"height": 32, "width": 32}}),
    "vit-oblong": ("ViT", {"size": {"height": 32, "width": 48}, "resample": 3}),
    "deit": ("DeiT", {"size": SQUARE, "crop_size": CROP, "do_center_crop": True, "resample": 3}),
    "beit": ("Beit", {"size": CROP, "do_center_crop": False, "image_mean": [0.1, 0.2, 0.3],
                      "image_std": [0.4, 0.5, 1]}),
    "dinov2": ("Bit", {"size": {"shortest_edge": 37}, "crop_size": CROP, "resample": 3}),
    "clip": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": CROP}),
    "mobilenet": ("MobileNetV2", {"size": {"shortest_edge": 36}, "crop_size": CROP}),
    "mobilevit": ("MobileViT", {"size": {"shortest_edge": 36}, "crop_size": CROP, "image_mean": [0.1, 0.2, 0.3]}),
    "mobilevit-rgb": ("MobileViT", {"size": {"shortest_edge": 36}, "crop_size": CROP, "do_flip_channel_order": False}),
    "siglip": ("Siglip", {"size": CROP}),
    "pvt": ("Pvt", {"size": CROP}),
    "mobilenet_v1": ("MobileNetV1", {"size": {"shortest_edge": 36}, "crop_size": CROP}),
    "convnext": ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
    "convnext-large": ("ConvNext", {"size": {"shortest_edge": 384}}),
    "levit": ("Levit", {"size": {"shortest_edge": 32}, "crop_size": CROP}),
    "poolformer": ("PoolFormer", {"size": {"shortest_edge": 32}, "crop_size": CROP, "crop_pct": 0.75}),
    "efficientnet": ("EfficientNet", {"size": CROP, "rescale_offset": True, "rescale_factor": 1 / 127.5,
                                      "include_top": True}),
    "other rescaling": ("ViT", {"size": CROP, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]}),
    "no rescaling": ("ViT", {"size": CROP, "do_rescale": False, "image_mean": [100, 110, 120],
                             "image_std": [50, 60, 70]}),
    "no normalization": ("ViT", {"size": CROP, "do_normalize": False}),
}  # fmt: skip


def picture(width, height):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(64, 88), (104, 72), (64, 64)])
def test_the_same_pixels_as_transformers(case, shape, tmp_path):
    kind, values = CASES[case]
    processor = getattr(tf, f"{kind}ImageProcessorPil")(**values)
    processor.save_pretrained(tmp_path)
    found = huggingface_preprocessing(tmp_path, 3)
    image = picture(*shape)
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    ours = to_input(image, found)
    assert ours.shape == theirs.shape == found.input_size
    assert np.abs(ours - theirs).max() <= 2e-5 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("ViTImageProcessor", {"size": CROP, "do_resize": False}, "at their own size"),
        ("ViTImageProcessor", {"size": {"shortest_edge": 32}}, "crops nothing"),
        ("ViTImageProcessor", {"size": {"longest_edge": 32}}, "resizes to {'longest_edge': 32}"),
        ("ViTImageProcessor", {"size": CROP, "do_pad": True}, "pads images"),
        ("ViTImageProcessor", {"size": CROP, "resample": 9}, "has the resampling 9"),
        ("MyImageProcessor", {"size": CROP}, "is not one that planish imitates"),
        ("BitImageProcessor", {"size": {"shortest_edge": 40}, "do_center_crop": True,
                               "crop_size": {"height": 32, "width": 24}}, "crops 32 x 24 out of images of one shorter"),
        ("DeiTImageProcessor", {"size": {"height": 40, "width": 64}, "do_center_crop": True, "crop_size": CROP},
         "crops the same share"),
        ("DeiTImageProcessor", {"size": {"height": 16, "width": 16}, "do_center_crop": True, "crop_size": CROP},
         "32 x 32 out of 16 x 16"),
    ],
)  # fmt: skip
def test_what_has_no_word(kind, values, words):
    with pytest.raises(PlanishError, match=words):
        preprocessing_of(kind, values)


def test_old_spellings_and_grey_images():
    """Sizes as numbers, and three means for a network with one channel."""
    found = preprocessing_of("ViTImageProcessorFast", {
        "size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}, channels=1)  # fmt: skip
    assert found.input_size == (1, 32, 32)
    assert found.mean == pytest.approx((0.2,))
    assert found.interpolation == "bilinear"
    assert preprocessing_of("ViTImageProcessor", {"size": [32, 24]}).input_size == (3, 32, 24)


def test_a_file_that_transformers_does_not_read(tmp_path):
    for text in ("[]", "{", '{"image_processor_type": "NoSuchProcessor"}'):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(PlanishError, match=r"preprocessor_config\.json is not understood"):
            huggingface_preprocessing(tmp_path, 3)
