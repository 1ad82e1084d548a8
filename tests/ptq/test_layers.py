"""Layers as matrix products, and the walk through a network."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.errors import PlanishError
from planish.network import assign, attach, taps_of, watch
from planish.network.batches import call_model, first_image, logits_of
from planish.ptq.layers import LayerCall, layer_weights, parameter_at, patches, visit_layers
from planish.quantizers import UniformQuantizer
from planish.scheme import Format
from tests.network.zoo import build

CONVOLUTIONS = {
    "1d": (F.conv1d, (2, 6, 11), (4, 6, 3), {"stride": 2, "padding": 1}),
    "2d": (F.conv2d, (2, 6, 9, 8), (4, 6, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": (F.conv2d, (2, 6, 9, 8), (4, 6, 3, 2), {"dilation": (2, 3), "padding": 2}),
    "same": (F.conv2d, (2, 6, 9, 8), (4, 6, 4, 3), {"padding": "same", "dilation": (2, 1)}),
    "valid": (F.conv2d, (2, 6, 9, 8), (4, 6, 4, 3), {"padding": "valid"}),
    "groups": (F.conv2d, (2, 6, 7, 7), (4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (F.conv2d, (2, 6, 7, 7), (12, 1, 3, 3), {"groups": 6, "stride": 2}),
    "3d": (F.conv3d, (2, 4, 5, 6, 7), (4, 2, 2, 3, 1), {"groups": 2, "padding": (1, 0, 1)}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_the_flattened_weight_is_the_convolution(name):
    torch.manual_seed(0)
    function, shape, kernel, options = CONVOLUTIONS[name]
    x, weight = torch.randn(shape), torch.randn(kernel)
    expected = function(x, weight, **options)
    groups = options.get("groups", 1)
    product = weight.reshape(groups, kernel[0] // groups, -1) @ patches(x, kernel[2:], **options)
    product = product.reshape(kernel[0], shape[0], *expected.shape[2:]).transpose(0, 1)
    torch.testing.assert_close(product, expected, atol=1e-4, rtol=1e-4)


def walk(model, example, decide=lambda site, calls: None, batches=None):
    plan = assign(watch(model, first_image(example)), "w4a4")
    wanted = layer_weights(plan)
    return visit_layers([model], plan.products, batches or [example], wanted, decide), wanted


def halves(example):
    return [torch.as_tensor(example[:1]), torch.as_tensor(example[1:])]


@pytest.mark.parametrize("name", ["convolutions", "gpt2", "twice", "vit_gray_28", "test_efficientnet", "encoder"])
def test_every_layer_is_its_matrix_times_its_columns(name, monkeypatch):
    monkeypatch.setattr("planish.ptq.layers.CHUNK", 3000)  # several chunks
    model, example = build(name)
    decided = []

    def decide(site, calls):
        decided.append(site)
        for call in calls[0]:
            y = call.output()
            chunks = list(call.columns(y))
            x, out = (torch.cat([chunk[i] for chunk in chunks], -1) for i in (0, 1))
            product = call.matrix(call.weight) @ x
            if call.bias is not None:
                product = product + call.bias.reshape(call.groups, -1, 1)
            torch.testing.assert_close(product, out, atol=1e-4, rtol=1e-4)
            assert torch.equal(call.from_matrix(call.matrix(call.weight)), call.weight)

    visited, wanted = walk(model, example, decide, batches=halves(example))
    assert visited == set(wanted)
    assert sorted(decided) == sorted(visited)  # once, also if a weight is used twice


def test_what_the_walk_leaves_behind_is_what_was_there():
    model, example = build("vit_gray_28")
    plan = assign(watch(model, first_image(example)), "w4a4")
    attach(model, plan.products, lambda site: UniformQuantizer(Format(8)).fit(torch.linspace(-3, 3, 9)))
    before, taps = copy.deepcopy(model), dict(taps_of(model))
    names = [name for name in layer_weights(plan) if "blocks.1" not in name]
    assert visit_layers([model], plan.products, [example], names, lambda *_: None) == set(names)
    assert dict(taps_of(model)) == taps
    with torch.no_grad():
        assert torch.equal(model(example), before(example))
    with pytest.raises(ValueError, match="stop"):
        visit_layers([model], plan.products, [example], names, stop)
    assert dict(taps_of(model)) == taps


class Seen(nn.Module):
    """A tap that keeps what passes."""

    def __init__(self):
        super().__init__()
        self.values = []

    def forward(self, x):
        self.values.append(x.clone())
        return x * 1.01


@pytest.mark.parametrize("name", ["encoder", "vit_gray_28", "swin", "einsum"])
def test_every_other_tap_sees_what_it_sees_without_the_walk(name):
    model, example = build(name)
    plan, parts = assign(watch(model, first_image(example)), "w4a4"), halves(example)
    wanted = layer_weights(plan)

    def put(site):
        return None if site.name in wanted else Seen()

    taps = attach(model, plan.products, put)
    with torch.no_grad():
        for part in parts:
            model(part)
    expected = {site: tap.values for site, tap in taps.items()}
    taps = attach(model, plan.products, put)
    visit_layers([model], plan.products, parts, wanted, lambda *_: None)
    for site, tap in taps.items():
        assert len(tap.values) == len(expected[site])
        assert all(torch.equal(a, b) for a, b in zip(tap.values, expected[site], strict=True))


def stop(*_):
    raise ValueError("stop")


def test_the_images_go_on_with_what_was_decided():
    model, example = build("test_resnet")
    shown, order = {}, []
    sites = layer_weights(assign(watch(model, example[:1]), "w4a4"))

    def decide(site, calls):
        order.append(site)
        shown[site] = torch.cat([call.args["input"] for call in calls[0]])
        parameter_at(model, sites[site]).mul_(0.5)

    walk(model, example, decide, batches=halves(example))
    seen = {}

    def note(name):
        def hook(module, args):
            seen.setdefault(name, args[0])

        return hook

    for site in sites.values():
        model.get_submodule(site.owner).register_forward_pre_hook(note(site.name))
    with torch.no_grad():
        model(example)
    assert list(seen) == order
    for name, x in seen.items():
        torch.testing.assert_close(shown[name], x)


def test_two_networks_side_by_side():
    model, example = build("vit_gray_28")
    other = copy.deepcopy(model)
    plan = assign(watch(model, example[:1]), "w4a4")
    sites = layer_weights(plan)
    exact = {}

    def decide(site, calls):
        assert [len(of_one) for of_one in calls] == [2, 2]
        exact[site] = torch.cat([call.output() for call in calls[1]])
        parameter_at(model, sites[site]).zero_()

    with torch.no_grad():
        logits = logits_of(call_model(other, example))
    visit_layers([model, other], plan.products, halves(example), sites, decide)
    torch.testing.assert_close(exact["head.weight"], logits)
    assert not any(parameter_at(model, site).any() for site in sites.values())
    assert all(parameter_at(other, site).any() for site in sites.values())


def test_an_addmm_that_scales_is_not_taken_for_a_layer():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = (nn.Parameter(torch.randn(*s)) for s in ((4, 3), (3,)))

        def forward(self, x):
            return torch.addmm(self.b, x, self.w, beta=2)

    assert walk(Scaled(), torch.randn(5, 4))[0] == set()


def test_batches_that_take_different_paths():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.a(self.b(x))

    count = threading.active_count()
    x = torch.ones(2, 4)
    with pytest.raises(PlanishError, match=r"batch reaches a\.weight where another reaches b\.weight"):
        walk(Moody(), x, batches=[x, -x])
    assert threading.active_count() == count


def test_a_linear_call_for_features_of_any_rank():
    x, w = torch.randn(2, 3, 5, 4), torch.randn(6, 4)
    call = LayerCall("w", F.linear, {"input": x, "weight": w, "bias": None})
    (columns, none), *rest = call.columns()
    assert none is None
    assert not rest
    assert torch.equal(columns[0].T.reshape(x.shape), x)
    scale = torch.rand(6, 1)
    assert torch.equal(call.matrix(scale), scale.expand(6, 4)[None])
