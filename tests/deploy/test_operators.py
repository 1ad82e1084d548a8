"""One operator a quantizer in the exported graph, and nothing else changes."""

import pytest
import torch
from torch import nn

import planish
from planish.deploy.operators import visible_quantizers
from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.network import attach, taps_of, watch
from planish.network.batches import call_model, logits_of
from planish.network.taps import replace_tap
from planish.quantizers import ShiftedQuantizer
from planish.scheme import Format, Scheme
from tests.network.zoo import NAMES, build


def quantized_zoo(name, scheme="w4a4"):
    """A quantized model of the zoo, and its example."""
    model, example = build(name)
    return planish.quantize(model, [example], scheme), example


def run(model, example):
    with torch.no_grad():
        return logits_of(call_model(model, example))


def export(model, example):
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    return torch.export.export(model, args, kwargs, strict=False)


def operators(exported):
    target = torch.ops.planish.fake_quantize.default
    return [node for node in exported.graph.nodes if node.target is target]


# a layer that is called twice quantizes its input twice, and its weight once a call (and once more where it is tied)
TWICE = ["body.input", "body.weight", "body.input", "body.weight", "tied.input", "body.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_graph_has_one_operator_for_each_site(name):
    model, example = quantized_zoo(name)
    expected = run(model, example)
    with visible_quantizers(model):
        assert torch.equal(run(model, example), expected)
        exported = export(model, example)
    sites = [site.name for site, _ in model.planish_assignment.quantized()]
    found = [node.args[-1] for node in operators(exported)]
    if name == "twice":
        assert sorted(found) == sorted([*TWICE, "head.input", "head.weight"])
    else:
        assert sorted(found) == sorted(sites)
    assert torch.equal(logits_of(call_model(exported.module(), example)), expected)
    assert torch.equal(run(model, example), expected)
    assert not operators(export(model, example))  # it is closed again


def test_the_operator_of_a_weight_gets_the_latent_parameter_and_the_tables_of_its_grid():
    model, example = quantized_zoo("test_resnet")
    with visible_quantizers(model):
        exported = export(model, example)
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    formats = {site.name: fmt for site, fmt in model.planish_assignment.quantized()}
    for node in operators(exported):
        x, scale, zero_point, qmin, qmax, offset, granularity, axis, group_size, site = node.args
        owner, _, slot = site.rpartition(".")
        assert names[scale.name] == f"{owner}.planish_taps.{slot}.scale"
        assert names[zero_point.name] == f"{owner}.planish_taps.{slot}.zero_point"
        fmt = formats[site]
        assert (qmin, qmax, offset, granularity) == (fmt.qmin, fmt.qmax, fmt.offset, fmt.granularity)
        if slot == "weight":
            assert names[x.name] == site
        assert (axis, group_size) == ((0, 0) if slot == "weight" else (-1, 0))


GRANULARITIES = {
    "group": (Format(4, "group", group_size=4), Scheme.parse("w4a4").activations, ("group", 0, 4)),
    "token": (Format(4, "channel"), Format(4, "token", symmetric=False), ("token", -2, 0)),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_and_tokens_are_named(granularity):
    weights, activations, expected = GRANULARITIES[granularity]
    model, example = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 5, 8)
    quantized = planish.quantize(model, [example], Scheme("w4a4", weights, activations))
    before = run(quantized, example)
    with visible_quantizers(quantized):
        exported = export(quantized, example)
    assert expected in {node.args[6:9] for node in operators(exported)}
    assert torch.equal(exported.module()(example), before)


def test_shifts_stay_around_the_operator():
    model, example = quantized_zoo("vit_gray_28")
    site = next(site for site, _ in model.planish_assignment.quantized() if site.name == "blocks.1.mlp.fc2.input")
    plain = dict(taps_of(model))[site.name]
    shifted = ShiftedQuantizer(plain.format)
    shifted.grid, shifted.before, shifted.after = plain.grid, torch.randn(128) / 9, torch.randn(128) / 9
    replace_tap(model, site, shifted)
    expected = run(model, example)
    with visible_quantizers(model):
        assert torch.equal(run(model, example), expected)
        exported = export(model, example)
    node = next(node for node in operators(exported) if node.args[-1] == site.name)
    (after,) = node.users
    assert [str(n.target) for n in (node.args[0], after)] == ["aten.add.Tensor"] * 2
    assert type(shifted) is ShiftedQuantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", [Format(4), Format(2, half_integer=True), Format(3, symmetric=False)], ids=str)
def test_the_operator_is_sound_and_gives_what_the_maths_gives(format, dtype):
    grid = Grid(torch.rand(4, 1) + 0.1, torch.zeros(4, 1), format.qmin, format.qmax, format.offset)
    x = torch.randn(4, 5).to(dtype)
    args = (x, *grid, "channel", 0, 0, "somewhere")
    assert torch.equal(torch.ops.planish.fake_quantize(*args), fake_quantize(x, grid))
    torch.library.opcheck(torch.ops.planish.fake_quantize.default, args)


def test_only_fixed_grids_can_be_shown():
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, watch(model, torch.zeros(1, 4)).products, lambda site: nn.Identity())
    message = "0.input: the tap there is a Identity and no quantizer with a fixed grid"
    with pytest.raises(PlanishError, match=message), visible_quantizers(model):
        pass


def test_an_error_inside_closes_it():
    model, _ = quantized_zoo("test_resnet")
    classes = [type(tap) for _, tap in taps_of(model)]
    with pytest.raises(ZeroDivisionError), visible_quantizers(model):
        raise ZeroDivisionError
    assert [type(tap) for _, tap in taps_of(model)] == classes
    assert not any("planish_site" in tap.__dict__ for _, tap in taps_of(model))
