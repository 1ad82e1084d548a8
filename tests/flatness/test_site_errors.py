"""The error of one site: moments against torch and scipy, verdicts on tensors of each kind, zeros and clipping."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from planish.flatness.site_errors import SAMPLE, ErrorTap, SiteError, site_errors, stride_of
from planish.flatness.subject import Subject
from planish.network.sites import Site
from planish.quantizers import UniformQuantizer
from planish.scheme import Format
from tests.flatness.networks import attention_net, conv_net, images

AFFINE, SYMMETRIC = {"symmetric": False}, {"symmetric": True}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measure(x: Tensor, fmt: Format, *, parts: int = 1, role: str = "input") -> tuple[SiteError, Tensor, Tensor]:
    """What the tap finds of x (images, values); the error of torch's own making, and the step of each value."""
    quantizer = UniformQuantizer(fmt).fit(x)
    site = Site("site", "", "site", role, (1, *x.shape[1:]))
    tap = ErrorTap(site, quantizer, len(x))
    for part in x.chunk(parts):
        assert tap(part) is part
    return tap.result(), (quantizer(x) - x).double(), quantizer.scale.double().expand_as(x)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "channels", "heavy"])
def test_moments_are_those_of_torch_and_scipy(kind, bits):
    x = {"normal": normal(40, 30), "relu": normal(40, 30).relu(), "heavy": normal(40, 30) ** 3,
         "channels": normal(40, 30) * torch.arange(1, 41)[:, None]}[kind]  # fmt: skip
    fmt = Format(bits, "channel" if kind == "channels" else "tensor", symmetric=kind != "relu")
    found, error, step = measure(x, fmt)
    assert found.count == x.numel()
    assert found.bits == bits
    assert found.mean == pytest.approx(error.mean().item(), rel=1e-4, abs=1e-7)
    assert found.variance == pytest.approx(error.var(correction=0).item(), rel=1e-4)
    assert found.step == pytest.approx(step.square().mean().sqrt().item(), rel=1e-5)
    assert found.variance_ratio == pytest.approx(error.var(correction=0).item() / (step.square().mean().item() / 12))
    present = (error / step)[x != 0].numpy()
    assert found.mean_steps == pytest.approx(present.mean(), abs=1e-4)
    assert found.kurtosis == pytest.approx(stats.kurtosis(present), rel=1e-3, abs=1e-3)
    law = stats.norm(present.mean(), present.std())
    assert found.distance_gaussian == pytest.approx(stats.ks_1samp(present, law.cdf).statistic, abs=1e-4)
    law = stats.uniform(-0.5, 1)
    assert found.distance_uniform == pytest.approx(stats.ks_1samp(present, law.cdf).statistic, abs=1e-4)


def test_batches_change_nothing():
    x = normal(60, 20, 7)
    whole, _, _ = measure(x, Format(4, **AFFINE))
    parts, _, _ = measure(x, Format(4, **AFFINE), parts=7)
    for name, value in dataclasses.asdict(whole).items():
        if isinstance(value, float):
            assert getattr(parts, name) == pytest.approx(value, rel=1e-5, abs=1e-8)
    assert parts.histogram.density == whole.histogram.density


def test_the_sample_of_a_long_tensor_has_every_channel():
    x = normal(64, 64, 64)
    x[:, :, 5] *= 20  # an outlier channel, 1/64 of the values, that a stride of 4 or 64 would miss
    found, error, step = measure(x, Format(4, observer="percentile"), parts=4)
    present = (error / step).flatten().numpy()
    law = stats.ks_1samp(present, stats.uniform(-0.5, 1).cdf).statistic
    assert found.distance_uniform == pytest.approx(law, abs=0.01)
    assert found.count == 64**3 > SAMPLE
    tap = ErrorTap(Site("site", "", "site", "input", (1, 64, 64)), UniformQuantizer(Format(4)).fit(x), 64)
    for part in x.chunk(4):
        tap(part)
    assert SAMPLE / 2 < sum(map(len, tap.codes)) <= SAMPLE
    for count, most in [(64**3, SAMPLE), (100, 7), (5, 10), (1, 1), (4096, 4095)]:
        stride = stride_of(count, most)
        assert len(range(0, count, stride)) <= most
        assert math.gcd(stride, count) == 1


def test_exact_zeros_make_no_error_and_are_told_apart():
    """Half the values zero: half the variance, and the law of the others as if the zeros were not there."""
    found, error, _ = measure(normal(200, 500).relu(), Format(8, **AFFINE))
    assert found.zeros == pytest.approx(0.5, abs=0.01)
    assert found.variance_ratio == pytest.approx(0.5, abs=0.03)
    assert found.variance_ratio_nonzero == pytest.approx(1.0, abs=0.05)
    assert found.variance_nonzero == pytest.approx(found.variance / (1 - found.zeros), rel=0.02)
    assert found.verdict == "uniform"
    assert (error == 0).float().mean() >= 0.49


def test_a_grid_without_a_zero_level_errs_on_zeros():
    found, error, step = measure(normal(100, 50).relu(), Format(2, half_integer=True))
    assert found.zeros == 0
    assert found.variance == pytest.approx(error.var(correction=0).item(), rel=1e-4)
    assert (((error / step).abs() - 0.5).abs() < 1e-6).float().mean() > 0.45


def test_clipped_values_are_counted_with_their_share_of_the_error():
    quantizer = UniformQuantizer(Format(3)).fit(normal(50, 100))
    x = normal(50, 100, seed=1) * 2
    tap = ErrorTap(Site("site", "", "site", "input", (1, 100)), quantizer, 50)
    tap(x)
    found, steps, error = tap.result(), x / quantizer.scale, quantizer(x) - x
    beyond = (steps > 3.5) | (steps < -4.5)
    assert found.clipped == pytest.approx(beyond.float().mean().item())
    assert 0.1 < found.clipped < 0.9
    assert found.clipped_error == pytest.approx(float(error[beyond].square().sum() / error.square().sum()), rel=1e-4)


def around_codes() -> Tensor:
    """Values that scatter around the levels of their grid: a Gaussian error."""
    levels = torch.arange(-8, 8).repeat(100, 20).float()
    return (levels + (0.12 * normal(*levels.shape)).clamp(-0.49, 0.49)).clamp(-8, 7)


@pytest.mark.parametrize(
    ("expected", "x", "fmt"),
    [
        ("uniform", normal(100, 100), Format(8)),
        ("uniform", normal(100, 100), Format(2, half_integer=True)),  # the body of a Gaussian at 2 bits, tails clipped
        ("uniform", normal(100, 100).relu(), Format(4, **AFFINE)),
        ("gaussian", around_codes(), Format(4, observer="minmax")),
        ("clipped", normal(100, 100) * (1 + 60 * (torch.arange(10_000) % 1500 == 7).reshape(100, 100)),
         Format(4, observer="percentile")),
        ("degenerate", torch.full((100, 100), 0.3), Format(4, **AFFINE)),
        ("degenerate", torch.zeros(100, 100), Format(4)),
        ("degenerate", normal(100, 100) * (1 + 60 * (torch.arange(10_000) % 99 == 7).reshape(100, 100)),
         Format(4, observer="minmax")),
        ("degenerate", (3 * normal(400, 49)).softmax(-1), Format(3, **AFFINE)),  # neither law: they crowd at 0
    ],
)  # fmt: skip
def test_verdicts(expected, x, fmt):
    found, _, _ = measure(x, fmt)
    assert found.verdict == expected, found


def test_what_does_not_vary_has_numbers_where_they_are_defined():
    for x in (torch.zeros(3, 4), torch.full((3, 4), 0.7), normal(1, 1)):
        found = dataclasses.asdict(measure(x, Format(4, **AFFINE))[0])
        undefined = {name for name, value in found.items() if isinstance(value, float) and math.isnan(value)}
        assert undefined <= {"kurtosis", "distance_gaussian", "distance_uniform"}
        assert found["variance"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_every_quantized_site_of_a_network_is_measured_on_float_values(make):
    model = make()
    subject = Subject.prepare(model, images(model), ["w4a4", "w3"])
    clean = subject.logits()
    found = site_errors(subject, subject.grids("w4a4"), subject.batches)
    assert torch.equal(subject.logits(), clean)
    assert [f.site for f in found] == [s.name for s in subject.sites if s.name in subject.quantizers["w4a4"]]
    head = {f.site: f for f in found}[f"{subject.products[-1].module}.weight"]
    weight = subject.model.get_submodule(subject.products[-1].module).weight
    assert head.count == weight.numel()  # once, not once a batch
    first = next(f for f in found if f.role == "input")
    x = torch.cat([x for x, _ in subject.batches])
    x = x if make is conv_net else x.flatten(1, 2)
    error = subject.quantizers["w4a4"][first.site](x) - x
    assert first.count == x.numel()
    assert first.variance == pytest.approx(error.var(correction=0).item(), rel=1e-4)
    assert {f.role for f in site_errors(subject, subject.grids("w3"), subject.batches)} == {"weight"}
    json.dumps([dataclasses.asdict(f) for f in found])
