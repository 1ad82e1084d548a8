"""In-memory images against timm's own evaluation transform, and the augmentation's dependence on its key alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from planish.data import BatchedTensorDataset, load_data
from planish.data.arrays import shift_and_flip
from planish.data.randomness import draw
from planish.models import Preprocessing

GREY = Preprocessing((1, 28, 28), (0.286,), (0.353,), crop_pct=1.0)
RNG = np.random.default_rng(0)


def timm_eval(p: Preprocessing):
    return create_transform(
        p.input_size, mean=p.mean, std=p.std, interpolation=p.interpolation, crop_pct=p.crop_pct, crop_mode=p.crop_mode
    )


def test_native_size_equals_timm_bit_for_bit():
    images = RNG.integers(0, 256, (3, 28, 28), np.uint8)
    data = BatchedTensorDataset(images, [0, 1, 2], GREY)
    expected = torch.stack([timm_eval(GREY)(Image.fromarray(image)) for image in images])
    assert torch.equal(data.__getitems__([0, 1, 2]).images, expected)
    assert torch.equal(data[1][0], expected[1])


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resized_and_repeated_like_timm(interpolation, mode):
    p = Preprocessing((3, 64, 64), interpolation=interpolation, crop_mode=mode)
    images = RNG.integers(0, 256, (2, 28, 28), np.uint8)
    got = BatchedTensorDataset(images, [0, 1], p).__getitems__([0, 1]).images
    expected = torch.stack([timm_eval(p)(Image.fromarray(image).convert("RGB")) for image in images])
    assert got.shape == (2, 3, 64, 64)
    # Pillow and torchvision round each resized pixel in their own way: at most one level of 255 apart.
    assert (got - expected).abs().max() <= 1.01 / 255 / min(p.std)


def test_rgb_becomes_the_luma_that_pillow_computes():
    images = RNG.integers(0, 256, (2, 28, 28, 3), np.uint8)
    got = BatchedTensorDataset(images.transpose(0, 3, 1, 2), [0, 1], GREY).__getitems__([0, 1]).images
    expected = torch.stack([timm_eval(GREY)(Image.fromarray(image).convert("L")) for image in images])
    assert torch.equal(got, expected)


def test_shift_and_flip_does_what_its_numbers_say():
    images = torch.from_numpy(RNG.integers(1, 256, (40, 2, 9, 9), np.uint8))
    numbers = draw(0, 0, np.arange(40), 3)
    got = shift_and_flip(images, numbers, 2)
    for image, (a, b, c), result in zip(images, numbers, got, strict=True):
        dy, dx = int(a % 5) - 2, int(b % 5) - 2
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        window = padded[:, 2 + dy : 11 + dy, 2 + dx : 11 + dx]
        assert torch.equal(result, window.flip(-1)) or not c >> np.uint64(63)
        assert torch.equal(result, window) or c >> np.uint64(63)


def test_augmentation_depends_on_seed_epoch_and_index_only():
    images = RNG.integers(0, 256, (50, 28, 28), np.uint8)

    def batch(seed, epoch, indices):
        data = BatchedTensorDataset(images, [0] * 50, GREY, augment=True, seed=seed)
        data.set_epoch(epoch)
        return data.__getitems__(indices).images

    whole = batch(3, 1, list(range(50)))
    assert torch.equal(batch(3, 1, [17, 4]), whole[[17, 4]])
    assert not torch.equal(batch(3, 2, list(range(50))), whole)
    assert not torch.equal(batch(4, 1, list(range(50))), whole)


def test_draws_are_uniform_and_pinned():
    numbers = draw(0, 0, np.arange(20_000), 3)
    assert np.unique(numbers).size == numbers.size
    share = ((numbers >> np.uint64(63)) == 1).mean(axis=0)
    assert np.all(np.abs(share - 0.5) < 0.02)  # 5 standard errors
    assert draw(-5, 7, np.array([3]), 1).tolist() == draw(-5, 7, np.array([0, 3]), 2)[1:, :1].tolist()
    assert draw(0, 0, np.array([0]), 2).tolist() == [PINNED]


PINNED = [2391539541053276776, 920862675595841680]


def test_embedded_data_are_balanced_and_fit_a_default_loader():
    data = load_data(None, GREY)
    assert len(data.train) == 10_000
    assert len(data.test) == 2_000
    assert len(data.classes) == 10
    assert np.bincount(data.train_labels).tolist() == [1000] * 10
    assert np.bincount(data.test.labels).tolist() == [200] * 10
    images, labels = next(iter(DataLoader(data.train, 7)))
    assert images.shape == (7, 1, 28, 28)
    assert labels.tolist() == data.train_labels[:7]
    assert data.notes == []


def test_embedded_data_fit_a_model_of_another_size():
    data = load_data("fashion-mnist", Preprocessing())
    assert data.test[0][0].shape == (3, 224, 224)
    assert "1 x 28 x 28" in data.notes[0]
