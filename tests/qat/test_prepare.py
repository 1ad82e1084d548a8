"""Quantizers go in where the plan says, start where they should, and come out as plain grids that compute the same."""

from dataclasses import replace

import pytest
import torch

from planish.errors import PlanishError
from planish.network import assign, taps_of, watch
from planish.ptq import Calibrate, Round, quantize
from planish.qat.method import Method
from planish.qat.methods import METHODS, DoReFa, LSQPlus
from planish.qat.prepare import bake_quantizers, insert_quantizers
from planish.quantizers import (
    DoReFaQuantizer,
    FixedQuantizer,
    LearnedQuantizer,
    PACTQuantizer,
    ShiftedLearnedQuantizer,
    StatsQuantizer,
    UniformQuantizer,
)
from planish.scheme import Scheme
from tests.training import tiny

MODELS = {"conv": (tiny.conv, 8), "vit": (tiny.vit, 16)}


def images(size, n=4):
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(1))


def ready(name, method, scheme="w4a4"):
    make, size = MODELS[name]
    model = make()
    plan = assign(watch(model, images(size, 1)), method.adapt(Scheme.parse(scheme)))
    return model, plan, insert_quantizers(model, [images(size)], plan, method), images(size)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["lsq", "dorefa", "statsq", "fixed"])
@pytest.mark.parametrize("activations", ["lsq", "lsq+", "pact", "shifted", "fixed"])
@pytest.mark.parametrize("scheme", ["w2a2", "w4a4"])
def test_baked_is_what_was_trained_bit_for_bit(name, weights, activations, scheme):
    method = replace(Method(), weights=weights, activations=activations)
    model, plan, taps, x = ready(name, method, scheme)
    assert set(taps) == {site.name for site, _ in plan.quantized()}
    parameters = [p for tap in taps.values() for p in tap.parameters()]
    assert all(p.dtype == torch.float32 for p in parameters)
    assert {id(p) for p in parameters} <= {id(p) for p in model.parameters()}
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model(x).square().mean().backward()
    with torch.no_grad():  # as if trained
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    for tap in taps.values():
        tap.keep_valid()
    model.eval()
    with torch.no_grad():
        trained = model(x)
    bake_quantizers(model, plan, x)
    assert torch.equal(model(x), trained)
    assert all(isinstance(tap, UniformQuantizer) for _, tap in taps_of(model))
    assert not any(p.requires_grad for p in model.parameters())
    for site, fmt in plan.quantized():
        tap = dict(taps_of(model))[site.name]
        assert tap.format == fmt
        if site.parameter:
            codes = model.get_submodule(site.owner)._parameters[site.slot]
            assert len(tap(codes)[0].unique()) <= 2**fmt.bits


def test_first_and_last_layer_learn_their_step_whatever_the_method():
    _, plan, taps, _ = ready("conv", replace(Method(), weights="statsq"), "w2a2")
    kinds = {name: type(tap) for name, tap in taps.items() if name.endswith("weight")}
    assert kinds == {"0.weight": LearnedQuantizer, "4.weight": StatsQuantizer, "9.weight": LearnedQuantizer}
    assert plan.formats["0.weight"].bits == 8
    assert not plan.formats["0.weight"].half_integer


def test_quantizers_start_on_the_calibrated_grids():
    model = tiny.conv()
    x = images(8)
    rtn = dict(taps_of(quantize(model, [x], "w4a4", [Calibrate(), Round()])))
    _, _, taps, _ = ready("conv", Method())
    for name, tap in taps.items():
        assert torch.equal(tap.grid.scale, rtn[name].grid.scale)
        assert torch.equal(tap.grid.zero_point, rtn[name].grid.zero_point)


def test_the_papers_own_starts():
    _, _, taps, _ = ready("conv", Method(init="lsq"))
    weight = tiny.conv()[4].weight.detach()
    expected = 2 * weight.abs().mean((1, 2, 3), keepdim=True) / 7**0.5
    torch.testing.assert_close(taps["4.weight"].scale.data, expected)


def test_kinds_of_quantizers():
    for method, weight, activation in [
        (Method(), LearnedQuantizer, LearnedQuantizer),
        (LSQPlus(), LearnedQuantizer, LearnedQuantizer),
        (METHODS["pact"](), DoReFaQuantizer, PACTQuantizer),
        (DoReFa(), DoReFaQuantizer, FixedQuantizer),
        (Method(activations="shifted"), LearnedQuantizer, ShiftedLearnedQuantizer),
    ]:
        _, _, taps, _ = ready("conv", method)
        assert type(taps["4.weight"]) is weight
        assert type(taps["4.input"]) is activation
    _, _, taps, _ = ready("conv", LSQPlus())
    assert isinstance(taps["4.input"].zero_point, torch.nn.Parameter)


def test_where_activations_have_their_features():
    _, _, taps, _ = ready("vit", Method(activations="shifted"))
    shapes = {name: tuple(tap.before.shape) for name, tap in taps.items() if not name.endswith("weight")}
    assert shapes["patch_embed.proj.input"] == (1,)
    assert shapes["blocks.0.mlp.fc1.input"] == (16,)
    assert shapes["blocks.0.attn.attention_qk_query"] == (8,)
    assert shapes["blocks.0.attn.attention_qk_key"] == (8,)
    assert shapes["blocks.0.attn.attention_av_value"] == (8,)


def test_unknown_quantizers_are_named():
    with pytest.raises(PlanishError, match="'cubic': choose one of lsq, dorefa"):
        ready("conv", Method(weights="cubic"))
    with pytest.raises(PlanishError, match=r"'cubic': choose one of lsq, lsq\+"):
        ready("conv", Method(activations="cubic"))


def test_moving_to_half_precision_leaves_scales_alone():
    model, _, taps, _ = ready("conv", Method())
    before = {name: tap.scale.detach().clone() for name, tap in taps.items()}
    model.bfloat16()
    assert all(torch.equal(taps[name].scale, scale) for name, scale in before.items())
    assert model[4]._parameters["weight"].dtype == torch.bfloat16
