"""The walk through networks: what it shows, what it leaves behind, and what it holds."""

import copy
import gc

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import assign, attach, taps_of, watch
from planish.network.batches import call_model, first_image, logits_of, map_tensors
from planish.ptq import Calibrate, FoldBatchNorm, quantize
from planish.ptq import walk as module
from planish.ptq.gptq import GPTQ
from planish.ptq.layers import layer_weights, parameter_at
from planish.ptq.ridge import RidgeCorrection
from planish.ptq.walk import peek, visit_layers
from planish.quantizers import UniformQuantizer
from planish.scheme import Format
from tests.network.zoo import build
from tests.ptq.test_quantize import same_state


def walk(model, example, decide=lambda site, calls: None, batches=None):
    plan = assign(watch(model, first_image(example)), "w4a4")
    wanted = layer_weights(plan)
    return visit_layers([model], plan.products, batches or [example], wanted, decide), wanted


def halves(example):
    return [map_tensors(example, lambda t: t[:1]), map_tensors(example, lambda t: t[1:])]


@pytest.mark.parametrize("name", ["convolutions", "gpt2", "twice", "vit_gray_28", "test_efficientnet", "encoder"])
def test_every_layer_is_its_matrix_times_its_columns(name, monkeypatch):
    monkeypatch.setattr("planish.ptq.layers.CHUNK", 3000)  # several chunks
    model, example = build(name)
    decided = []

    def decide(site, calls):
        decided.append(site)
        for (call,) in calls:
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
        seen = [x.flatten() for x in tap.values]
        assert all(any(torch.equal(x.flatten(), y) for y in seen) for x in expected[site])


def stop(*_):
    raise ValueError("stop")


def test_the_images_go_on_with_what_was_decided():
    model, example = build("test_resnet")
    shown, order = {}, []
    sites = layer_weights(assign(watch(model, example[:1]), "w4a4"))

    def decide(site, calls):
        order.append(site)
        shown[site] = torch.cat([call.args["input"] for (call,) in calls])
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
        calls = list(calls)
        assert [len(of_batch) for of_batch in calls] == [2, 2]
        exact[site] = torch.cat([call.output() for _, call in calls])
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

    x = torch.ones(2, 4)
    with pytest.raises(PlanishError, match=r"batch reaches a\.weight where another reaches b\.weight"):
        walk(Moody(), x, lambda site, calls: list(calls), batches=[x, -x])


PREPARE = [FoldBatchNorm(), Calibrate()]


@pytest.mark.parametrize("name", ["vit_gray_28", "swin", "test_resnet", "hf_vit_sdpa", "gpt2"])
def test_cutting_the_network_changes_nothing(name, monkeypatch):
    model, example = build(name)
    step = GPTQ(ridge=RidgeCorrection(), memory=0)
    cuts = []
    monkeypatch.setattr(
        module._Walk, "cut", lambda self, index, cut=module._Walk.cut: (cuts.append(index), cut(self, index))
    )
    ours = quantize(model, halves(example), "w3a4", [*PREPARE, step])
    monkeypatch.setattr(module._Walk, "cut", lambda self, index: None)
    assert same_state(ours, quantize(model, halves(example), "w3a4", [*PREPARE, step]))
    assert len(cuts) > 1 or name == "gpt2"  # whose inputs are no floats


def test_the_precision_is_kept_behind_a_cut():
    model, example = build("vit_gray_28")
    seen = []
    walk(
        model.double(), example.double(), lambda site, calls: seen.extend(call.args["input"].dtype for (call,) in calls)
    )
    assert set(seen) == {torch.float64}


def live_bytes():
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and not x.untyped_storage().filename]
    return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_what_is_held_does_not_grow_with_the_number_of_batches():
    model, example = build("vit_gray_28")
    batch, held = example[:1].repeat(4, 1, 1, 1), {}
    plan = assign(watch(model, batch[:1]), "w4a4")
    for count in (2, 12):
        batches, most = [batch] * count, 0

        def decide(site, calls):
            nonlocal most
            for i, _ in enumerate(calls):
                most = max(most, live_bytes()) if i == 1 else most

        visit_layers([model], plan.products, batches, layer_weights(plan), decide, memory=0)
        held[count] = most
    assert held[12] < 1.01 * held[2]


def test_the_first_calls_can_be_looked_at():
    first, every = peek(iter([("a",), ("b",)]))
    assert first == ("a",)
    assert list(every) == [("a",), ("b",)]


@pytest.mark.parametrize("step", [GPTQ, RidgeCorrection])
def test_memory_that_is_none(step):
    with pytest.raises(PlanishError, match=r"memory is -1: give a number of gigabytes, 0 or larger"):
        step(memory=-1)
