"""Bits for each layer within a budget: kept, repeatable, better than one width for all, and back from a file."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import planish
from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.network import taps_of, weights_megabytes
from planish.network.batches import call_model, logits_of
from planish.ptq import Calibrate, FoldBatchNorm, Round, get_method, quantize
from planish.ptq.assign_bits import SENSITIVITIES, AssignBits, with_bits
from planish.ptq.widths import total_bit_operations
from planish.scheme import Scheme
from planish.task import CLASSES
from tests.network.zoo import build

RTN = (FoldBatchNorm(), Calibrate(), Round())


class Peek:
    """Keeps what the passes before it logged."""

    name = "peek"

    def __call__(self, calibration):
        self.log = list(calibration.log)


@torch.no_grad()
def run(model, example):
    return logits_of(call_model(model, example))


def mixed(model, batches, scheme, bits, **options):
    return quantize(model, batches, scheme, with_bits(RTN, bits), **options)


def fast(name):
    """A scheme whose ranges are quickly set."""
    scheme = Scheme.parse(name)
    weights, activations = (fmt and replace(fmt, observer="minmax") for fmt in (scheme.weights, scheme.activations))
    return replace(scheme, weights=weights, activations=activations)


def weight_widths(model):
    formats = model.planish_assignment.formats
    return {name: fmt.bits for name, fmt in formats.items() if name.endswith("weight")}


@pytest.fixture(scope="module", params=["vit_gray_28", "convolutions"])
def network(request):
    model, example = build(request.param)
    return model, [example, example.flip(-1)]


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_a_size_is_kept_and_used(network, sensitivity):
    model, batches = network
    before = copy.deepcopy(model)
    least, most = (weights_megabytes(quantize(model, batches, replace(fast(s), edge_bits=None), RTN))
                   for s in ("w2a4", "w8a4"))  # fmt: skip
    for share in (0.1, 0.5):
        limit = 1e6 * (least + share * (most - least))
        made = mixed(model, batches, fast("w4a4"), AssignBits(f"{limit:.3f}", sensitivity, widths=(2, 4, 8)))
        assert 0.85 * limit <= 1e6 * weights_megabytes(made) <= limit
        assert len(set(weight_widths(made).values())) > 1
        assert set(weight_widths(made).values()) <= {2, 4, 8}
        activations = {f.bits for n, f in made.planish_assignment.formats.items() if not n.endswith("weight")}
        assert activations == {4, 8}  # as the scheme says
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    rows = {row.site: row.bits for row in planish.ledger(made).rows}
    assert all(rows[name] == bits for name, bits in weight_widths(made).items())


def uneven():
    """A narrow layer that everything goes through, beside a wide one that hardly counts."""
    torch.manual_seed(0)

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.narrow, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 6)
            self.wide_in, self.wide_out = nn.Linear(16, 128), nn.Linear(128, 16)

        def forward(self, x):
            x = self.stem(x).relu()
            return 4 * self.head((self.narrow(x) + 0.02 * self.wide_out(self.wide_in(x).relu())).relu())

    return Uneven(), [torch.randn(64, 8), torch.randn(64, 8)]


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_the_bits_go_where_they_count(sensitivity):
    model, batches = uneven()
    scheme = replace(Scheme.parse("w3"), edge_bits=None)
    uniform = quantize(model, batches, scheme)
    made = mixed(model, batches, scheme, AssignBits(f"{1e6 * weights_megabytes(uniform) + 1:.0f}", sensitivity))
    assert weights_megabytes(made) <= weights_megabytes(uniform) + 1e-6
    widths = weight_widths(made)
    assert widths["wide_in.weight"] <= 3 >= widths["wide_out.weight"]
    assert widths["narrow.weight"] >= 4 <= widths["stem.weight"]
    fresh = torch.randn(200, 8)
    loss = [CLASSES.exact(run(model, fresh), run(other, fresh)).mean() for other in (made, uniform)]
    assert loss[0] < 0.5 * loss[1]


def test_bit_operations_with_and_without_the_activations():
    model, example = build("vit_gray_28")
    uniform = quantize(model, [example], "w4a4")
    limit = total_bit_operations(uniform.planish_assignment)
    for activations in (False, True):
        step = AssignBits(f"{limit}bops", "fisher", activations=activations, images=2)
        made = mixed(model, [example], fast("w4a4"), step)
        assert 0.9 * limit < total_bit_operations(made.planish_assignment) <= limit
        formats = made.planish_assignment.formats
        attention = {f.bits for name, f in formats.items() if "attention" in name}
        assert (attention == {4}) is not activations
        assert all(tap.fitted and tap.format == formats[name] for name, tap in taps_of(made))


def test_activations_are_measured_too():
    model, example = build("convolutions")
    limit = total_bit_operations(quantize(model, [example], "w4a4").planish_assignment)
    step = AssignBits(f"{limit}bops", activations=True, widths=(2, 4, 8))
    made = mixed(model, [example], fast("w4a4"), step)
    assert total_bit_operations(made.planish_assignment) <= limit
    pairs = {tuple(made.planish_assignment.formats[site.name].bits for site in product.sites)
             for product in made.planish_assignment.products}  # fmt: skip
    assert len(pairs) > 2


def test_the_same_twice_and_a_budget_for_all_of_it():
    model, example = build("test_vit")
    bits = AssignBits("0.13x", "fisher", widths=(2, 8))
    first, second = (mixed(model, [example], fast("w4a4"), bits) for _ in range(2))
    assert first.planish_assignment.scheme == second.planish_assignment.scheme
    assert torch.equal(run(first, example), run(second, example))
    peek = Peek()
    large = quantize(model, [example], fast("w3a4"), [*with_bits(RTN, AssignBits("1GB")), peek])
    assert set(weight_widths(large).values()) == {8}
    assert "every layer at its widest" in peek.log[1]["text"]


def test_the_log_says_what_was_chosen():
    model, example = build("vit_gray_28")
    peek, share = Peek(), 0.16
    made = quantize(model, [example], fast("w4a4"), [*with_bits(RTN, AssignBits(f"{share}x", widths=(2, 4))), peek])
    notes = [entry for entry in peek.log if entry["event"] == "note"]
    assert [note["pass"] for note in notes] == ["assign-bits"]
    text = notes[0]["text"]
    assert re.search(r"predicted divergence from the float network \d\S+ nats; ", text)
    bits = weight_widths(made)
    assert text.count(" for ") == len(set(bits.values()))
    for name, width in bits.items():
        said = text.partition(f"; w{width} for ")[2].partition(";")[0].split(", ")
        assert any(product.startswith(name.removesuffix("weight")) for product in said)
    floating = sum(4 * p.numel() for p in model.parameters())
    assert weights_megabytes(made) <= share * floating / 1e6


def test_pinned_products_keep_their_bits():
    model, example = build("vit_gray_28")
    scheme = replace(fast("w4a4"), overrides=(("head.linear", "w8a8"), ("blocks.0.attn.qkv.linear", "w5a4")))
    made = mixed(model, [example], scheme, AssignBits("0.35x", "fisher", widths=(2, 3)), allow=("blocks.1.mlp.fc1",))
    widths = {n: f and f.bits for n, f in made.planish_assignment.formats.items() if n.endswith("weight")}
    assert widths["head.weight"] == 8
    assert widths["blocks.0.attn.qkv.weight"] == 5
    assert widths["blocks.1.mlp.fc1.weight"] is None
    assert made.planish_assignment.scheme.overrides[:2] == scheme.overrides


@pytest.mark.parametrize("kind", ["test_resnet", "test_vit"])
def test_back_from_a_file(kind, tmp_path):
    arguments = {"num_classes": 3, "in_chans": 1} | ({"img_size": 32, "patch_size": 8} if kind == "test_vit" else {})
    torch.manual_seed(0)
    model, images = timm.create_model(kind, **arguments).eval(), torch.randn(8, 1, 32, 32)
    with torch.no_grad():
        model.train()(images)
    made = mixed(model.eval(), [images], fast("w4a4"), AssignBits("0.14x", "fisher"))
    looks = Preprocessing((1, 32, 32), (0.5,), (0.5,), crop_pct=1.0)
    recipe = {"source": "timm", "architecture": kind, "arguments": arguments}
    save(made, tmp_path / "q.safetensors", recipe=recipe, preprocessing=looks, protocol={})
    loaded = load(tmp_path / "q.safetensors")
    assert weights_megabytes(made) <= 0.14 * weights_megabytes(model)  # folding has added biases
    assert loaded.planish_assignment.scheme == made.planish_assignment.scheme
    assert len(loaded.planish_assignment.scheme.overrides) > 2
    assert weights_megabytes(loaded) == weights_megabytes(made)
    assert torch.equal(run(loaded, images), run(made, images))
    assert str(planish.ledger(loaded)) == str(planish.ledger(made))


def test_nothing_to_choose():
    model, example = build("vit_gray_28")
    scheme = replace(Scheme.parse("w4a4"), edge_bits=None)
    peek = Peek()
    quantize(model, [example], scheme, [AssignBits("1kB"), peek], allow="*")
    assert [entry["text"] for entry in peek.log if entry["event"] == "note"] == [
        "there is no layer whose bits could be chosen"
    ]


def test_where_it_goes():
    bits, peek = AssignBits("1MB"), Peek()
    assert [step.name for step in with_bits(RTN, bits)] == ["fold-batchnorm", "assign-bits", "calibrate", "round"]
    assert [step.name for step in with_bits(RTN[1:], bits)] == ["assign-bits", "calibrate", "round"]
    assert with_bits([], bits) == [bits]
    assert [step.name for step in with_bits([peek, *RTN], bits)][:3] == ["peek", "fold-batchnorm", "assign-bits"]
    assert with_bits([peek], bits) == [bits, peek]


@pytest.mark.parametrize("method", ["rotate", "repq", "dfq", "gptq"])
def test_methods_that_change_the_float_network_keep_the_budget(method):
    model, example = build("test_vit" if method == "rotate" else "convolutions")
    share = 0.3 if method != "rotate" else 0.14
    passes = with_bits(get_method(method).passes(), AssignBits(f"{share}x", "fisher", widths=(2, 4, 8)))
    made = quantize(model, [example], fast("w4a4"), passes)
    assert 0.8 * share < weights_megabytes(made) / weights_megabytes(model) <= share
    assert len(set(weight_widths(made).values())) > 1


def test_refusals():
    model, example = build("test_resnet")
    for options, match in (
        ({"budget": "much"}, "budget 'much' is not understood"),
        ({"budget": "1MB", "sensitivity": "hessian"}, "sensitivity is 'hessian': choose one of measured, fisher"),
        ({"budget": "1MB", "activations": True}, "the bits of activations do not change: give bit operations"),
        ({"budget": "1MB", "widths": ()}, "widths is "),
        ({"budget": "1MB", "widths": (1, 4)}, "from 2 to 8"),
        ({"budget": "1MB", "widths": (4, 4)}, "different numbers"),
        ({"budget": "1MB", "widths": (4, True)}, "different numbers"),
        ({"budget": "1MB", "images": 0}, "images is 0: give at least 1"),
    ):
        with pytest.raises(PlanishError, match=match):
            AssignBits(**options)
    with pytest.raises(PlanishError, match=r"budget 2 kB is too little: with every layer at 2 bits .* takes [\d.]+ kB"):
        mixed(model, [example], "w4a4", AssignBits("2kB"))
    with pytest.raises(PlanishError, match=r"budget 0\.001x \([\d.]+ k?B\) is too little: with every layer at 3 bits"):
        mixed(model, [example], "w4a4", AssignBits("0.001x", widths=(3, 8)))
    with pytest.raises(PlanishError, match="assign-bits comes after a pass that rounded"):
        quantize(model, [example], "w4a4", [*RTN, AssignBits("1MB")])


def test_what_is_needed_at_least_is_enough():
    model, example = build("convolutions")
    with pytest.raises(PlanishError) as caught:
        mixed(model, [example], "w4a4", AssignBits("20B"))
    needed = str(caught.value).partition("takes ")[2].partition(",")[0]
    made = mixed(model, [example], "w4a4", AssignBits(needed, "fisher"))
    assert list(weight_widths(made).values()).count(2) >= len(weight_widths(made)) - 1


def test_values_that_are_not_finite_are_named():
    model, example = build("test_resnet")
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(PlanishError, match=r"layer2\.0\.conv1\.weight: cannot set a range"):
        quantize(model, [example], "w3", [AssignBits("0.13x")])
