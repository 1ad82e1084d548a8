"""One look at a network gives the grids of calibrated rounding at any width."""

from __future__ import annotations

import pytest
import torch

from planish.network import assign, fold_batchnorm, taps_of, watch
from planish.ptq import quantize
from planish.ptq.grids import watch_grids
from planish.scheme import Scheme
from tests.flatness.networks import attention_net, conv_net, images


@pytest.mark.parametrize("build", [conv_net, attention_net])
def test_they_are_those_of_calibrated_rounding(build):
    model = build()
    batches = [x for x, _ in images(model)]
    fold_batchnorm(model, batches[0])
    watched = watch(model, batches[0][:1])
    plan = assign(watched, Scheme.parse("w8a8"))
    fit = watch_grids(model, plan.products, {site.name: fmt for site, fmt in plan.quantized()}, batches)
    for name in ("w8a8", "w4a4", "w2a3"):
        expected = dict(taps_of(quantize(model, batches, name)))
        found = {site.name: fit(site, fmt) for site, fmt in assign(watched, Scheme.parse(name)).quantized()}
        assert found.keys() == expected.keys()
        for site, quantizer in found.items():
            assert torch.equal(quantizer.scale, expected[site].scale)
            assert torch.equal(quantizer.zero_point, expected[site].zero_point)
            assert quantizer.format == expected[site].format
    assert not list(taps_of(model))
