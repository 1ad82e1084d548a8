import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kurtosis as scipy_kurtosis
from torch import nn

from planish.errors import PlanishError
from planish.flattening import flatten, plain
from planish.training import GradientL1, Kurtosis
from planish.training.regularizers import kurtosis
from tests.training import tiny


class Of:
    """As much of a run as the terms look at."""

    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize("seed", range(3))
def test_kurtosis_is_scipys(seed):
    w = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(seed)) ** 3 + 2
    assert kurtosis(w).item() == pytest.approx(scipy_kurtosis(w.flatten().double().numpy(), fisher=False), rel=1e-4)


def test_kurtosis_of_known_laws():
    generator = torch.Generator().manual_seed(0)
    assert kurtosis(torch.rand(200_000, generator=generator)).item() == pytest.approx(1.8, abs=0.02)
    assert kurtosis(torch.randn(200_000, generator=generator)).item() == pytest.approx(3.0, abs=0.1)
    constant = torch.full((4, 4), 0.3, requires_grad=True)
    kurtosis(constant).backward()
    assert torch.isfinite(constant.grad).all()


def test_the_term_is_the_mean_over_weights_of_two_dimensions():
    model = tiny.conv()
    weights = [m.weight for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    expected = 0.5 * torch.stack([(kurtosis(w) - 1.8) ** 2 for w in weights]).mean()
    torch.testing.assert_close(Kurtosis(0.5).loss(Of(model), None, None, torch.zeros(1)), expected)
    assert Kurtosis().loss(Of(nn.BatchNorm1d(3)), None, None, torch.zeros(1)) is None


def test_training_under_it_makes_weights_more_uniform():
    def after(**penalty):
        model = flatten(tiny.mlp(), tiny.loader(), settings=plain(tiny.settings(epochs=20), **penalty))
        return sum((kurtosis(p) - 1.8).abs().item() for p in model.parameters() if p.dim() > 1)

    assert after(kurtosis=3.0) < 0.7 * after()


@pytest.mark.parametrize("make", [tiny.conv, tiny.mlp])
def test_gradient_l1_is_the_sum_of_the_gradients_sizes(make):
    model = make().eval()
    images, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    mine = GradientL1(0.3).loss(Of(model), images, labels, model(images))
    F.cross_entropy(model(images), labels).backward()
    expected = 0.3 * sum(p.grad.abs().sum() for p in model.parameters() if p.dim() > 1)
    torch.testing.assert_close(mine, expected)


def test_gradient_l1_is_differentiated_through_the_gradient():
    """A central difference of the penalty itself, in float64; smooth activations, so that there is no kink."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    images, labels = torch.randn(6, 1, 8, 8).double(), torch.tensor([0, 1, 2, 3, 0, 1])

    def penalty():
        return GradientL1(0.3).loss(Of(model), images, labels, model(images))

    penalty().backward()
    weight = model[1].weight
    way = torch.randn_like(weight)
    slope, step = (weight.grad * way).sum().item(), 1e-5
    with torch.no_grad():
        weight += step * way
    above = penalty().item()
    with torch.no_grad():
        weight -= 2 * step * way
    assert slope == pytest.approx((above - penalty().item()) / (2 * step), rel=1e-4)


def test_training_under_it_lowers_the_gradient_also_through_attention():
    batches = tiny.loader(n=16, size=16, shuffle=False)

    def after(**penalty):
        model = flatten(tiny.vit(), batches, settings=plain(tiny.settings(epochs=6), **penalty))
        return sum(GradientL1(1.0).loss(Of(model), x, y, model(x)).item() for x, y in batches)

    assert after(gradient_l1=0.03) < 0.7 * after()


def test_wrong_weights_and_missing_labels():
    for make in (Kurtosis, GradientL1):
        with pytest.raises(PlanishError, match="positive"):
            make(0.0)
    with pytest.raises(PlanishError, match="labels"):
        GradientL1().loss(Of(tiny.mlp()), None, None, torch.zeros(1, 4))
