import pytest
import torch

from planish.data.views import random_view
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


def test_errors():
    with pytest.raises(PlanishError, match=r"\(N, C, H, W\), got a tensor of shape \(4, 7\)"):
        random_view(torch.zeros(4, 7))
    with pytest.raises(PlanishError, match=r"in \[0, 1\]"):
        random_view(images(), shift=2.0)
