"""Ranges by the error of the product, not of the tensor."""

import copy

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import assign, detach, taps_of, watch
from planish.ptq import Calibrate, Calibration, RefineRanges, Round, ScaleHeads, quantize, refine
from tests.network.zoo import build
from tests.ptq.test_heads import X, uneven
from tests.ptq.test_reconstruction import images
from tests.training import tiny

torch.set_num_threads(1)


def refined(model, x, scheme="w3a3", **options):
    """The ranges before and after, by site, and the work."""
    model = model.eval().requires_grad_(False)
    work = Calibration(model, x, assign(watch(model, x[0][:1]), scheme), [])
    Calibrate()(work)
    before = {name: tap.grid for name, tap in taps_of(model)}
    RefineRanges(**options)(work)
    return before, dict(taps_of(model)), work


class Sum(nn.Module):
    """A first and a last layer at 8 bits, and between them one that sums many small values and a large one."""

    def __init__(self):
        super().__init__()
        self.first, self.total, self.last = nn.Linear(4, 64), nn.Linear(64, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.total.weight.fill_(1.0)

    def forward(self, x):
        small = 0.02 + 0.01 * self.first(x).sigmoid()
        return self.last(self.total(torch.cat([small[:, 1:], torch.ones_like(small[:, :1])], 1)))


def test_small_values_that_add_up_are_not_rounded_to_zero():
    model, x = Sum(), [torch.randn(32, 4)]
    before, taps, work = refined(copy.deepcopy(model), x)
    tap, exact = taps["total.input"], model.total(torch.full((1, 64), 0.025))
    assert tap.grid.scale < 0.6 * before["total.input"].scale
    small = torch.full((1, 64), 0.025)
    after = (model.total(tap(small)) - exact).abs().max()
    tap.grid = before["total.input"]
    assert after < 0.5 * (model.total(tap(small)) - exact).abs().max()
    assert work.log[-1]["pass"] == "refine-ranges"
    assert "of 3 ranges were changed" in work.log[-1]["text"]


def test_no_module_gets_worse():
    model = tiny.vit()
    x = images(16)
    before, taps, _ = refined(copy.deepcopy(model), x, images=16)
    assert len({float(tap.grid.scale / before[name].scale) for name, tap in taps.items()}) > 2
    seen = {}
    fc1 = model.blocks[0].mlp.fc1
    fc1.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    model.eval()(x[0])
    tap = taps["blocks.0.mlp.fc1.input"]
    errors = []
    for grid in (tap.grid, before["blocks.0.mlp.fc1.input"]):
        tap.grid = grid
        errors.append(float((fc1(tap(seen["x"])) - seen["y"]).square().sum()))
    assert errors[0] <= errors[1]


def test_the_ranges_of_heads_are_refined_one_by_one():
    model = uneven().eval().requires_grad_(False)
    with torch.no_grad():
        for block in model.blocks:  # so that heads matter
            block.attn.proj.weight *= 10
            block.attn.qkv.weight[24:] *= 10
    work = Calibration(model, [X], assign(watch(model, X[:1]), "w4a4"), [])
    ScaleHeads()(work)
    Calibrate()(work)
    before = {name: tap.grid.scale for name, tap in taps_of(model) if tap.grid.scale.numel() > 1}
    RefineRanges()(work)
    factors = [dict(taps_of(model))[name].grid.scale / scale for name, scale in before.items()]
    assert any((f != 1).all() and len(set(f.flatten().tolist())) > 1 for f in factors)
    assert all(f.shape == (1, 2, 1, 1) for f in factors)


def test_nothing_is_left_behind_and_what_is_written_is_a_quantized_network():
    model = tiny.conv()
    quantized = quantize(model.eval(), images(), "w4a4", [Calibrate(), RefineRanges(), Round()])
    assert not any("forward" in module.__dict__ for module in quantized.modules())
    x = images()[0]
    assert torch.isfinite(quantized(x)).all()
    assert not torch.equal(quantized(x), model(x))
    detach(quantized)
    assert torch.equal(quantized(x), model(x))


def test_bad_options_and_places_are_refused():
    with pytest.raises(PlanishError, match="images is 0"):
        RefineRanges(images=0)
    with pytest.raises(PlanishError, match=r"factors is \(0\.0,\)"):
        RefineRanges(factors=(0.0,))
    with pytest.raises(PlanishError, match="put it after Calibrate"):
        quantize(tiny.conv().eval(), images(), "w4a4", [RefineRanges()])


class Residual(nn.Module):
    """Adds to what a layer has read, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.in_place = in_place

    def forward(self, x):
        x = self.stem(x)
        y = self.inner(x)
        if self.in_place:
            x += 3 * y
        else:
            x = x + 3 * y
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["rtn", "refined"])
def test_a_tensor_that_is_changed_after_a_layer_has_read_it(method):
    passes = {"rtn": [Calibrate(), Round()], "refined": [Calibrate(), RefineRanges(), Round()]}[method]
    ours, plain = (dict(taps_of(quantize(Residual(one).eval(), images(), "w4a3", passes))) for one in (True, False))
    assert all(torch.equal(ours[name].grid.scale, plain[name].grid.scale) for name in plain)


def test_images_are_taken_from_as_many_batches_as_hold_them():
    whole, parts = images(8, 24), [part for batch in images(8, 24) for part in batch.split(5)]
    ours, one = (
        dict(taps_of(quantize(tiny.conv().eval(), some, "w3a3", [Calibrate(), RefineRanges(images=20), Round()])))
        for some in (parts, whole)
    )
    less = dict(taps_of(quantize(tiny.conv().eval(), whole, "w3a3", [Calibrate(), RefineRanges(images=5), Round()])))
    scales = [[tap.grid.scale for tap in taps.values()] for taps in (ours, one, less)]
    assert all(torch.allclose(a, b) for a, b in zip(*scales[:2], strict=True))
    assert not all(torch.allclose(a, b) for a, b in zip(*scales[1:], strict=True))


def test_attention_with_one_product_for_queries_keys_and_values(monkeypatch):
    """nn.MultiheadAttention has one where its three inputs are one tensor."""
    model, example = build("torchvision_vit")
    calls = {}
    given = refine._first_calls
    monkeypatch.setattr(refine, "_first_calls", lambda *args: calls.update(given(*args)) or calls)
    quantized = quantize(model, [example], "w4a4", [Calibrate(), RefineRanges(images=2), Round()])
    modules = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert modules
    for path in modules:
        assert len({id(tensor) for tensor in calls[path].args[:3]}) == 1
    assert torch.isfinite(quantized(example)).all()
