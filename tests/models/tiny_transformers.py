"""Small networks of transformers as folders, as ``save_pretrained`` writes them."""

from __future__ import annotations

import torch
import transformers as tf

from planish.models.huggingface_config import quietly

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_IMAGES = {"image_size": 32, "patch_size": 8}
CONFIGS = {
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, _VIT | _IMAGES),
    "deit": (tf.DeiTForImageClassification, tf.DeiTConfig, _VIT | _IMAGES),
    "deit-teacher": (tf.DeiTForImageClassificationWithTeacher, tf.DeiTConfig, _VIT | _IMAGES),
    "swin": (tf.SwinForImageClassification, tf.SwinConfig, {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}),
    "dinov2": (tf.Dinov2ForImageClassification, tf.Dinov2Config, {**_VIT, **_IMAGES, "mlp_ratio": 2}),
    "beit": (tf.BeitForImageClassification, tf.BeitConfig, {
        **_VIT, **_IMAGES, "use_relative_position_bias": True}),
    "convnext": (tf.ConvNextForImageClassification, tf.ConvNextConfig, {
        "image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}),
    "mobilevit": (tf.MobileViTForImageClassification, tf.MobileViTConfig, {
        "image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "num_attention_heads": 2, "patch_size": 2}),
}  # fmt: skip
CLASSES = ("cat", "dog", "hen", "owl", "pig")


def config_of(name, **changes):
    values = {"id2label": dict(enumerate(CLASSES)), "label2id": {label: i for i, label in enumerate(CLASSES)}}
    _, kind, own = CONFIGS[name]
    for key in ("intermediate_size",) if name == "dinov2" else ():
        own = {k: v for k, v in own.items() if k != key}
    return kind(**(values | own | changes))


def network(name, **changes):
    """A network with random weights, in evaluation mode."""
    torch.manual_seed(0)
    with quietly():
        model = CONFIGS[name][0](config_of(name, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write(folder, name="vit", processor=None, **changes):
    """Save a network and its image processor into a folder; returns the network."""
    model = network(name, **changes)
    side = model.config.image_size
    processor = processor or tf.ViTImageProcessor(size={"height": side, "width": side}, resample=3)
    with quietly():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model
