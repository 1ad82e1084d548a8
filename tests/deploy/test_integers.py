"""Whole networks in integers against the fake-quantized ones: product by product, code by code, logit by logit."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import planish
from planish.deploy.arithmetic import IntegerProducts, rounding_bound
from planish.deploy.coded import Coded
from planish.deploy.integers import CodingTap, integer_model, integer_report
from planish.errors import PlanishError
from planish.functional import quantize
from planish.network import attach, taps_of, watch
from planish.network.batches import call_model, logits_of
from planish.network.taps import replace_tap
from planish.qat import QATSettings, train_quantized
from planish.qat.methods import get_method
from planish.quantizers import ShiftedQuantizer
from planish.scheme import Format, Scheme
from tests.network.zoo import NAMES, build
from tests.training import tiny

torch.set_num_threads(1)


class Checked(IntegerProducts):
    """Computes every product in float, too, and compares."""

    def __init__(self):
        super().__init__()
        self.compared, self.worst = 0, 0.0

    def product(self, call):
        found = super().product(call)
        left, right = call.operands.values()
        depth, reason = self.notes[frozenset({left.tap.site, right.tap.site})]
        assert not reason
        names = list(call.operands)
        plain = call.compute({n: t.plain for n, t in call.operands.items()})
        sizes = {n: t.plain.double().abs() for n, t in call.operands.items()}
        if call.signature.weighted:
            positional, named = call.arguments
            bias = positional[2] if len(positional) > 2 else named.get("bias")
            size = call.compute({**sizes, "bias": None if bias is None else bias.double().abs()})
        elif call.signature.operator in ("addmm", "baddbmm"):
            added = call.arguments[0][0].double().abs()
            size = torch.matmul(*sizes.values()) + added
        else:
            size = call.compute(sizes)
        groups = 1 if right.part is None else int(right.part.max()) + 1
        bound = rounding_bound(depth, groups) * size
        difference = (found.double() - plain.double()).abs()
        assert (difference <= bound).all(), (names, (difference / bound).max())
        self.compared, self.worst = self.compared + 1, max(self.worst, float((difference / bound).nan_to_num().max()))
        return found


def checked(quantized, example):
    """The logits of the fake-quantized model and of the integer model, each of whose products was compared."""
    integers, products = integer_model(quantized), Checked()
    for _, tap in taps_of(integers):
        tap.products = products
    with torch.no_grad():
        fake, integer = (logits_of(call_model(m, example)) for m in (quantized, integers))
    return fake, integer, products, integer_report(integers)


SCHEMES = {
    "w4a4": "w4a4", "w2a8": "w2a8",
    "tokens": replace(Scheme.parse("w4a8"), activations=Format(8, "token", symmetric=False)),
    "groups": Scheme("w4a8", Format(4, "group", group_size=4), Format(8, symmetric=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["w4a4", "w2a8"])
def test_every_product_of_every_kind_of_network_is_within_the_bound(name, scheme):
    model, example = build(name)
    fake, integer, products, report = checked(planish.quantize(model, [example], scheme), example)
    assert products.compared >= len(report.rows)
    assert not report.in_float
    assert 0 < products.worst < 1
    torch.testing.assert_close(
        integer, fake, rtol=0, atol=0.1 * float(fake.abs().max())
    )  # codes next to a tie may differ


@pytest.mark.parametrize("name", ["gpt2", "vit_gray_28", "encoder"])
def test_groups_within_the_bound(name):
    model, example = build(name)
    if name == "vit_gray_28":
        model.patch_embed.proj = nn.Conv2d(1, 32, 4, stride=8)
    fake, integer, products, report = checked(planish.quantize(model, [example], SCHEMES["groups"]), example)
    assert products.worst < 1
    assert not report.in_float
    torch.testing.assert_close(integer, fake, rtol=0, atol=0.02 * float(fake.abs().max()))


def test_scales_of_tokens():
    """Only the values of an attention, whose tokens are summed over, stay in float."""
    model, example = build("vit_gray_28")
    integers = integer_model(planish.quantize(model, [example], SCHEMES["tokens"]))
    integers(example)
    rows = integer_report(integers).in_float
    assert [row.product for row in rows] == [f"blocks.{i}.attn.attention_av" for i in (0, 1)]
    assert {row.reason for row in rows} == {
        f"the scales of blocks.{i}.attn.attention_av_value differ along the sum" for i in (0, 1)
    }


@cache
def embedded(network):
    loaded = planish.load_model(network)
    data = planish.load_data(None, loaded.preprocessing)
    images = torch.stack([data.train[i][0] for i in range(64)])
    return loaded.model, images, torch.stack([data.test[i][0] for i in range(16)])


@pytest.mark.parametrize("network", ["vit", "convnet"])
@pytest.mark.parametrize("method", ["rtn", "fast"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a4", "w3a3", "w2a4"])
def test_the_embedded_networks(network, method, scheme):
    model, calibration, images = embedded(network)
    fake, integer, products, report = checked(planish.quantize(model, [calibration], scheme, method), images)
    assert not report.in_float
    assert products.worst < 1
    assert torch.equal(integer.argmax(1), fake.argmax(1))
    assert (integer - fake).abs().median() < 1e-5


@pytest.mark.parametrize("scheme", ["w4a4", "w2a4", "w8a8"])
def test_codes_differ_only_next_to_ties(scheme):
    """Between two products lies a ReLU only, so the bound of the first one is that of what the next one quantizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    x = torch.randn(3000, 96)
    quantized = planish.quantize(model, [x[:500]], scheme)
    integers = integer_model(quantized)
    with torch.no_grad():
        first = [m[1](m[0](x)) for m in (quantized, integers)]
    layer = integers[0]
    a, w = dict(taps_of(layer))["input"](x), dict(taps_of(layer))["weight"](layer._parameters["weight"])
    size = a.plain.double().abs() @ w.plain.double().abs().T + layer.bias.abs()
    bound = rounding_bound(96) * size
    grid = dict(taps_of(quantized[2]))["input"].grid
    codes = [quantize(y, grid) for y in first]
    steps = first[0].double() / grid.scale
    to_tie = (steps - (steps.floor() + 0.5)).abs() * grid.scale
    near = to_tie <= bound * (1 + 2**-20) + 2**-23 * first[0].abs()
    assert torch.equal(codes[0][~near], codes[1][~near])
    assert near.float().mean() < 0.01


def test_shifted_quantizers_run_in_integers():
    model, example = build("vit_gray_28")
    quantized = planish.quantize(model, [example], "w4a8")
    for site, _ in quantized.planish_assignment.quantized():
        if site.name.endswith(("mlp.fc1.input", "qk_key")):
            plain = dict(taps_of(quantized))[site.name]
            shifted = ShiftedQuantizer(plain.format)
            shape = (16, 1) if site.slot.endswith("key") else (32,)
            shifted.grid, shifted.before, shifted.after = plain.grid, torch.randn(shape) / 50, torch.randn(shape) / 50
            replace_tap(quantized, site, shifted)
    integers = integer_model(quantized)
    with torch.no_grad():
        torch.testing.assert_close(integers(example), quantized(example), rtol=0, atol=2e-3)
    assert not integer_report(integers).in_float


@pytest.mark.parametrize("method", [replace(get_method("ofq"), query_key=False), get_method("ofq"), get_method("lsq"),
                                    replace(get_method("lsq"), weights="dorefa", activations="pact")])  # fmt: skip
@pytest.mark.parametrize("scheme", ["w2a4", "w4a4"])
def test_trained_models(method, scheme):
    settings = QATSettings(averaging=0.9, training=tiny.settings(epochs=1, lr=0.05))
    if getattr(method, "weights", "") == "dorefa":
        scheme = replace(Scheme.parse(scheme), weights=Format(4, half_integer=True))
    trained = train_quantized(tiny.vit(), tiny.loader(n=12, size=16), scheme, method, settings=settings)
    fake, integer, products, report = checked(trained, torch.randn(3, 1, 16, 16))
    assert not report.in_float
    assert products.worst < 1
    torch.testing.assert_close(integer, fake, rtol=0, atol=0.1 * float(fake.abs().max()))


def test_what_is_in_float_is_said():
    model, example = build("vit_gray_28")
    scheme = replace(Scheme.parse("w4a8"), overrides=(("blocks.0.mlp.fc1.linear", "w4"),))
    attention = "blocks.1.attn.attention_qk"
    quantized = planish.quantize(model, [example], scheme, allow=(attention,))
    integers = integer_model(quantized)
    with pytest.raises(PlanishError, match="there is nothing to report: run what"):
        integer_report(integers)
    integers(example)
    report = integer_report(integers)
    assert {row.product: row.reason for row in report.in_float} == {
        "blocks.0.mlp.fc1.linear": "blocks.0.mlp.fc1.input stays in float",
        attention: f"{attention}_query and {attention}_key stay in float",
    }
    assert str(report).splitlines()[-1] == "12 of 14 matrix products run in integers"
    assert "head.linear" in str(report)
    assert "int32, depth 32" in str(report)


class Lowered(nn.Module):
    """Changes its weight after reading it through the tap, as no module that planish knows does."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)
        self.factor = 1.0

    def forward(self, x):
        weight = self.weight
        return self.head(nn.functional.linear(x, weight if self.factor == 1 else weight * self.factor))


def test_values_changed_on_the_way_are_reported():
    model, x = Lowered(), torch.randn(5, 8)
    quantized = planish.quantize(model, [x], "w4a4")
    integers = integer_model(quantized)
    for one in (quantized, integers):
        one.factor = 3.0
    with torch.no_grad():
        torch.testing.assert_close(integers(x), quantized(x))
    (row,) = integer_report(integers).in_float
    assert row.reason == "the values of weight were changed on the way from the quantizer to the product"


def test_the_model_given_is_left_alone_and_the_copy_looks_the_same():
    model, example = build("test_resnet")
    quantized = planish.quantize(model, [example], "w4a4")
    with torch.no_grad():
        expected = quantized(example)
        integers = integer_model(quantized)
        integers(example)
        assert torch.equal(quantized(example), expected)
    assert not any(isinstance(tap, CodingTap) for _, tap in taps_of(quantized))
    assert type(integers).__name__ == type(quantized).__name__
    assert type(integers(example)) is torch.Tensor
    assert not isinstance(integers(example), Coded)


def test_models_that_are_not_quantized_are_refused():
    model, example = build("test_resnet")
    with pytest.raises(PlanishError, match=r"the model ResNet is not quantized; pass what planish\.quantize"):
        integer_model(model)
    quantized = planish.quantize(model, [example], "w4a4")
    attach(quantized, quantized.planish_assignment.products, lambda site: nn.Identity())
    with pytest.raises(PlanishError, match=r"conv1\.0\.input: the tap there is a Identity|the tap there is a Identity"):
        integer_model(quantized)
    assert watch(model, example).products
