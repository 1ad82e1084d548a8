"""EWGS against the paper's discretizer, whose values lie in [0, 1]."""

import pytest
import torch

from planish.functional import Grid, fake_quantize
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.ewgs import EWGS
from planish.qat.oscillation import rounded_weights
from planish.quantizers import learned_quantize
from planish.training import Ingredient
from tests.training import tiny


def ewgs_twin(x, gradient, low, high, levels, delta):
    """Section 3.2: x_n = (x - l) / (u - l), x_q = round((n - 1) x_n) / (n - 1), and the gradient of equation 5.

    ``gradient`` is that of the dequantized value; all of the chain rule is spelled out.
    """
    x_n = (x - low) / (high - low)
    x_q = (x_n * (levels - 1)).round() / (levels - 1)
    g_q = gradient * (high - low)  # of the value (high - low) x_q + low
    g_n = g_q * (1 + delta * g_q.sign() * (x_n - x_q))
    return g_n / (high - low)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize(("bits", "delta"), [(2, 0.3), (4, 2.0)])
def test_gradient_is_that_of_equation_5(bits, delta, offset):
    levels, scale = 2**bits, torch.tensor(0.2, dtype=torch.float64)
    grid = Grid(scale, torch.tensor(0.0, dtype=torch.float64), -levels // 2, levels // 2 - 1, offset)
    low, high = (grid.qmin + offset) * scale, (grid.qmax + offset) * scale
    generator = torch.Generator().manual_seed(0)
    x = low + (high - low) * torch.rand(300, generator=generator, dtype=torch.float64)
    gradient = torch.randn(300, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    learned_quantize(leaf, grid, pull=delta / (levels - 1)).backward(gradient)
    torch.testing.assert_close(leaf.grad, ewgs_twin(x, gradient, low, high, levels, delta))


def test_a_step_back_to_the_level_is_longer_than_one_away():
    x = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.0], requires_grad=True)  # the level is 0
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])  # a step goes against it
    learned_quantize(x, Grid(torch.tensor(1.0), torch.tensor(0.0), -2, 1), pull=0.5).backward(gradient)
    torch.testing.assert_close(x.grad, torch.tensor([1.15, -0.85, 0.85, -1.15, 1.0]))


def test_method():
    settings = QATSettings(averaging=None, training=tiny.settings(epochs=1))
    plain = train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=settings)
    assert tiny.same(plain, train_quantized(tiny.conv(), tiny.loader(), "w2a2", EWGS(pull=0.0), settings=settings))
    assert not tiny.same(plain, train_quantized(tiny.conv(), tiny.loader(), "w2a2", "ewgs", settings=settings))


class Look(Ingredient):
    """At the rounded weight: how far it is from its level, in steps, and its gradient."""

    def around(self, run, compute):
        loss = compute()
        (weight,) = rounded_weights(run.model).values()
        latent, grid = weight.parameter.detach(), weight.tap.grid
        self.beside = (latent - fake_quantize(latent, grid)) / grid.scale
        self.gradient = weight.parameter.grad.clone()
        return loss


def one_step(method, scheme):
    look, settings = Look(), QATSettings(averaging=None, training=tiny.settings(epochs=1))
    train_quantized(tiny.conv(), tiny.loader(n=4), scheme, method, settings=settings, extra=[look])
    return look


def test_weights_are_pulled():
    """With activations in float, so that it is they alone."""
    plain, pulled = one_step(Method(), "w2"), one_step(EWGS(pull=0.5), "w2")
    expected = plain.gradient * (1 + 0.5 * plain.gradient.sign() * plain.beside)
    torch.testing.assert_close(pulled.gradient, expected)
    assert not torch.allclose(pulled.gradient, plain.gradient)


def test_activations_are_pulled():
    """With weights on fixed grids, which nothing pulls."""
    plain, pulled = one_step(Method(weights="fixed"), "w2a2"), one_step(EWGS(weights="fixed", pull=0.5), "w2a2")
    assert not torch.allclose(pulled.gradient, plain.gradient)
