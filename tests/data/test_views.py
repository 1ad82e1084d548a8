import pytest
import torch

from planish.data.views import distort, random_view
from planish.errors import PlanishError


def images(n=6, c=3, h=8, w=10):
    return torch.arange(n * c * h * w, dtype=torch.float32).reshape(n, c, h, w)


def test_nothing_asked_for_nothing_changed():
    assert torch.equal(random_view(images(), shift=0.0, flip=0.0), images())
    assert torch.equal(random_view(images(), shift=0.0, flip=1.0), images().flip(-1))


def test_every_image_is_one_of_its_shifts():
    """Against reflection padding and a crop, as PyTorch does them."""
    torch.manual_seed(0)
    x = images()
    for view, image in zip(random_view(x, shift=0.2, flip=0.5), x, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")
        candidates = [padded[:, i : i + 8, j : j + 10] for i in range(5) for j in range(5)]
        candidates += [candidate.flip(-1) for candidate in candidates]
        assert any(torch.equal(view, candidate) for candidate in candidates)


def test_draws_for_each_image_from_the_global_generator():
    x = images(1).expand(40, -1, -1, -1)
    torch.manual_seed(3)
    first = random_view(x)
    torch.manual_seed(3)
    assert torch.equal(random_view(x), first)
    assert not torch.equal(random_view(x), first)
    assert len({tuple(view.flatten().tolist()) for view in first}) > 5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_dtype_and_channels_stay(dtype):
    assert random_view(torch.ones(2, 1, 5, 5, dtype=dtype)).dtype == dtype
    assert random_view(torch.ones(2, 1, 1, 1)).shape == (2, 1, 1, 1)


def noisy(n=4, c=2, h=8, w=12, seed=0):
    return 3 * torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed)) + 1


def distort_twin(image, strength, contrast, brightness, noise, top, left):
    """One image (C, H, W), its draws given."""
    mean = image.mean()
    deviation = ((image - mean) ** 2).mean().sqrt()
    out = (image - mean) * (1 + strength * contrast) + mean
    out = out + strength * brightness * deviation + 0.2 * strength * noise * deviation
    tall, wide = (round(strength / 2 * side) for side in image.shape[1:])
    out[:, top : top + tall, left : left + wide] = mean
    return out


def test_distortion_is_that_of_its_twin():
    x, strength = noisy(), 0.6
    torch.manual_seed(1)
    mine = distort(x, strength)
    torch.manual_seed(1)
    (contrast, brightness), noise = (torch.rand(2, 4) - 0.5), torch.randn(4, 2, 8, 12)
    tops, lefts = torch.randint(0, 8 - 2 + 1, (4,)), torch.randint(0, 12 - 4 + 1, (4,))
    for i in range(4):
        twin = distort_twin(x[i], strength, contrast[i], brightness[i], noise[i], tops[i], lefts[i])
        torch.testing.assert_close(mine[i], twin)


def test_distortion_of_no_strength_changes_nothing_and_a_small_one_little():
    x = noisy()
    assert distort(x, 0.0) is x
    assert (distort(x, 0.01) - x).abs().max() < 0.1 * x.std()
    assert distort(x.bfloat16(), 0.5).dtype == torch.bfloat16
    assert torch.isfinite(distort(torch.ones(2, 1, 1, 1), 1.0)).all()


def test_distortion_draws_for_each_image_from_the_global_generator():
    x = noisy(1).expand(5, -1, -1, -1)
    torch.manual_seed(3)
    first = distort(x, 1.0)
    torch.manual_seed(3)
    assert torch.equal(distort(x, 1.0), first)
    assert not torch.equal(distort(x, 1.0), first)
    assert len({tuple(view.flatten().tolist()) for view in first}) == 5


def test_errors_of_distortion():
    with pytest.raises(PlanishError, match=r"in float, got torch.uint8 of shape \(2, 1, 4, 4\)"):
        distort(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 0.5)
    with pytest.raises(PlanishError, match="in float"):
        distort(torch.zeros(4, 7), 0.5)
    with pytest.raises(PlanishError, match=r"strength of a distortion is 1.5: it lies in \[0, 1\]"):
        distort(noisy(), 1.5)


def test_errors():
    with pytest.raises(PlanishError, match=r"\(N, C, H, W\), got a tensor of shape \(4, 7\)"):
        random_view(torch.zeros(4, 7))
    with pytest.raises(PlanishError, match=r"in \[0, 1\]"):
        random_view(images(), shift=2.0)
