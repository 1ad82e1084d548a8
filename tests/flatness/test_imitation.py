"""Rounding imitated by a gain and noise: moments, zeros, seeds, and the loss that it foretells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from planish.flatness.imitation import Imitator, decompose, imitate, imitators, shared_dims
from planish.flatness.subject import Subject
from planish.functional import Grid, fake_quantize
from planish.network import Product, Site
from planish.quantizers import UniformQuantizer
from planish.scheme import Format
from planish.task import CLASSES
from tests.flatness.networks import attention_net, conv_net, images


def test_the_gain_is_that_of_a_regression_through_zero_and_the_rest_is_uncorrelated():
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    rounded = UniformQuantizer(Format(2, "channel", symmetric=True)).fit(x)(x)
    parts = decompose(x, rounded, [1])
    for row in range(4):
        a, b = x[row].double().numpy(), rounded[row].double().numpy()
        gain = np.linalg.lstsq(a[:, None], b, rcond=None)[0][0]
        assert parts.gain[row].item() == pytest.approx(gain, rel=1e-9)
        rest = b - gain * a
        assert abs(np.corrcoef(a, rest)[0, 1]) < 0.05
        assert parts.variance[row].item() == pytest.approx(rest.var(), rel=1e-9)
        assert parts.mean[row].item() == pytest.approx(rest.mean(), abs=1e-12)
    assert parts.gain.shape == (4, 1)
    assert (parts.gain < 0.99).all()  # two bits shrink a Gaussian


def test_with_many_bits_it_is_the_noise_of_the_textbook():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    grid = Grid(torch.tensor(0.05), torch.tensor(0.0), -1000, 1000, 0.0)
    parts = decompose(x, fake_quantize(x, grid))
    assert parts.gain.item() == pytest.approx(1, abs=1e-4)
    assert parts.variance.item() == pytest.approx(0.05**2 / 12, rel=0.02)


def site(role: str = "input", slot: str = "input", axis: int | None = None) -> tuple[Product, Site]:
    one = Site("layer.input", "layer", slot, role, (1,), axis)
    return Product("layer", "linear", "linear", (one,)), one


def test_zeros_stay_zeros_and_make_no_noise():
    x = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0)).relu()
    quantizer = UniformQuantizer(Format(3, "tensor", symmetric=False)).fit(x)
    out = Imitator(quantizer, *site(), seed=7)(x)
    assert torch.equal(out == 0, x == 0)
    mine, theirs = (out - x)[x > 0], (quantizer(x) - x)[x > 0]
    assert mine.var().item() == pytest.approx(theirs.var().item(), rel=0.05)
    assert mine.mean().item() == pytest.approx(theirs.mean().item(), abs=0.005)


def test_a_tensor_of_zeros_and_a_constant_have_no_noise():
    for value in (0.0, 2.5):
        x = torch.full((3, 4), value)
        quantizer = UniformQuantizer(Format(4, "tensor", symmetric=False)).fit(x)
        out = Imitator(quantizer, *site(), seed=7)(x)
        torch.testing.assert_close(out, quantizer(x), rtol=1e-5, atol=1e-6)


def test_a_feature_that_is_nearly_constant_is_rounded_as_it_would_be():
    x = torch.randn(64, 9, 3, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 0.7 + 0.001 * x[..., 0]
    quantizer = UniformQuantizer(Format(2, "tensor", symmetric=False)).fit(x)
    out = Imitator(quantizer, *site(), seed=7)(x)
    torch.testing.assert_close(out[..., 0], quantizer(x)[..., 0], atol=0.01, rtol=0)
    assert (out[..., 1] - quantizer(x)[..., 1]).abs().max() > 0.1


def test_moments_are_shared_over_images_and_tokens_or_pixels():
    product, one = site()
    assert shared_dims(product, one, 3) == [0, 1]
    assert shared_dims(product, one, 2) == [0]
    assert shared_dims(*site(slot="attention_qk_key"), 4) == [0, 3]
    assert shared_dims(replace(product, operator="conv2d"), one, 4) == [0, 2, 3]
    assert shared_dims(*site("weight", "weight", 0), 4) == [1, 2, 3]
    assert shared_dims(*site("weight", "weight", None), 1) == [0]


def test_weights_are_drawn_once_and_activations_anew():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    quantizer = UniformQuantizer(Format(3, "tensor", symmetric=False)).fit(x)
    kept, fresh = (Imitator(quantizer, *which, seed=5) for which in (site("weight", "weight", 0), site()))
    assert torch.equal(kept(x), kept(x))
    assert not torch.equal(fresh(x), fresh(x))
    assert torch.equal(Imitator(quantizer, *site("weight", "weight", 0), seed=5)(x), kept(x))


@pytest.mark.parametrize("build", [conv_net, attention_net])
def test_the_divergence_under_imitation_is_near_that_under_rounding(build):
    model = build()
    subject = Subject.prepare(model, images(model, count=200, batch=50), ["w8a8", "w4a4", "w2a2"])
    reference, clean = subject.logits(), subject.losses().mean().item()
    for scheme in ("w4a4", "w2a2"):
        with subject.tapped(subject.quantizers[scheme]):
            rounded = CLASSES.exact(reference, subject.logits()).mean().item()
        assert 1 / 3 < imitate(subject, scheme, draws=8).divergence / rounded < 3
    few, many = (imitate(subject, s).divergence for s in ("w2a2", "w8a8"))
    assert few > 100 * many
    assert subject.losses().mean().item() == pytest.approx(clean)


def test_the_seed_decides():
    model = conv_net()
    subject = Subject.prepare(model, images(model), ["w3a3"])
    assert imitate(subject, "w3a3", seed=1) == imitate(subject, "w3a3", seed=1)
    assert imitate(subject, "w3a3", seed=1) != imitate(subject, "w3a3", seed=2)
    taps = imitators(subject, subject.grids("w3a3", activations=False))
    assert set(taps) == {site.name for site in subject.sites if site.is_weight}
