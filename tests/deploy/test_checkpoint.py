"""Saving and loading: the same outputs bit for bit, the same codes, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import planish
from planish.deploy.checkpoint import load, read_head, save
from planish.errors import PlanishError
from planish.functional import quantize as codes_of
from planish.models import Preprocessing, read_weights, save_weights
from planish.network import ledger, taps_of, weights_megabytes
from planish.ptq import quantize
from planish.qat import train_quantized
from planish.scheme import Format, Scheme
from tests.deploy.tiny import LOOKS, RECIPES, network

EIGHT = Format(8, "tensor", symmetric=False)
FORMATS = {
    "symmetric by channel": Format(3, "channel"), "half-integer by channel": Format(2, "channel", half_integer=True),
    "affine by channel": Format(5, "channel", symmetric=False), "affine by tensor": Format(4, symmetric=False),
    "symmetric by tensor": Format(6), "half-integer by tensor": Format(4, half_integer=True),
    "symmetric by group": Format(3, "group", group_size=8), "seven bits": Format(7, "channel"),
    "affine by group": Format(2, "group", symmetric=False, group_size=8), "two bits": Format(2, "channel"),
    "half-integer by group": Format(2, "group", half_integer=True, group_size=8),
}  # fmt: skip


@pytest.fixture(params=list(RECIPES))
def quantized(request):
    model, images = network(request.param)
    return quantize(model, [images], "w3a4"), RECIPES[request.param], images


def same_codes(a, b):
    """Whether all weights have the same codes on the same grids; how many there are."""
    others, found = dict(taps_of(b)), 0
    for site, _ in a.planish_assignment.quantized():
        if site.parameter:
            tap, other = dict(taps_of(a))[site.name], others[site.name]
            assert torch.equal(tap.scale, other.scale)
            assert torch.equal(tap.zero_point, other.zero_point)
            weights = (m.get_submodule(site.owner)._parameters[site.slot] for m in (a, b))
            mine, theirs = (codes_of(w, t.grid) for w, t in zip(weights, (tap, other), strict=True))
            assert torch.equal(mine, theirs)
            found += 1
    return found


def test_the_loaded_model_computes_the_same(quantized, tmp_path):
    model, recipe, images = quantized
    save(model, tmp_path / "q.safetensors", recipe=recipe, preprocessing=LOOKS, protocol={"method": "rtn"},
         classes=["a", "b", "c"])  # fmt: skip
    loaded = load(tmp_path / "q.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.planish_preprocessing == LOOKS
    assert loaded.planish_protocol == {"method": "rtn"}
    assert loaded.planish_classes == ("a", "b", "c")
    assert str(ledger(loaded)) == str(ledger(model))
    assert loaded.planish_assignment == model.planish_assignment
    assert weights_megabytes(loaded) == weights_megabytes(model)
    assert same_codes(model, loaded) > 5
    for name in ("again", "once more"):  # and what was loaded is saved as it is
        save(loaded, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "q.safetensors").read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_back(name, tmp_path):
    model, images = network("vit")
    scheme = Scheme("own", FORMATS[name], EIGHT, edge_bits=None)
    made = quantize(model, [images], scheme)
    save(made, tmp_path / "q", preprocessing=LOOKS)
    loaded = load(tmp_path / "q")
    assert torch.equal(loaded(images), made(images))
    assert same_codes(made, loaded) > 5
    bits = sum(p.numel() for n, p in made.named_parameters() if p.dim() > 1 and "embed" not in n) * FORMATS[name].bits
    entries, _ = read_weights(tmp_path / "q")
    packed = [entries[key] for key in read_head(tmp_path / "q").packed]
    assert bits / 8 <= sum(t.numel() for t in packed) < bits / 8 + 5000  # and the patches
    assert all(t.dtype == torch.uint8 for t in packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back(dtype, tmp_path):
    model, images = network("resnet")
    made = quantize(model, [images], "w4a8").to(dtype)
    save(made, tmp_path / "q", preprocessing=LOOKS)
    loaded = load(tmp_path / "q")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(images.to(dtype)), made(images.to(dtype)))
    same_codes(made, loaded)


def test_a_model_in_float_comes_back(tmp_path):
    for name in RECIPES:
        model, images = network(name)
        save(model, tmp_path / name, preprocessing=LOOKS)
        loaded = load(tmp_path / name)
        assert torch.equal(loaded(images), model(images))
        assert all(p.requires_grad for p in loaded.parameters())
        assert read_head(tmp_path / name).assignment is None
        assert torch.equal(quantize(loaded, [images], "w4")(images), quantize(model, [images], "w4")(images))


def test_what_planish_load_model_gave_needs_no_arguments(tmp_path):
    """Through flattening's copy, quantization and training, and in a new process."""
    loaded = planish.load_model("convnet")
    images = torch.randn(8, *loaded.preprocessing.input_size)
    made = quantize(copy.deepcopy(loaded.model), [images], "w2a4")
    save(made, tmp_path / "q")
    assert read_head(tmp_path / "q").preprocessing == loaded.preprocessing
    batches = [(images, torch.arange(8))]
    trained = train_quantized(made, batches, "w2a4", "lsq", epochs=1)
    save(trained, tmp_path / "t")
    torch.save([images, made(images), trained(images)], tmp_path / "expected")
    program = (
        f"import torch; from planish.deploy.checkpoint import load; torch.set_num_threads(1)\n"
        f"x, *expected = torch.load({str(tmp_path / 'expected')!r})\n"
        f"for name, y in zip('qt', expected): assert torch.equal(load({str(tmp_path)!r} + '/' + name)(x), y)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Tied(nn.Module):
    """Two layers with one weight, and an embedding that reads the classifier's weight as it is."""

    planish_preprocessing = Preprocessing((1, 1, 4), (0.5,), (0.5,), crop_pct=1.0)

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.again, self.last = (nn.Linear(n, m) for n, m in ((4, 8), (8, 8), (8, 8), (8, 3)))
        self.again.weight = self.inner.weight
        self.words = nn.Embedding(3, 8)
        self.last.weight = self.words.weight

    def forward(self, x):
        x = self.again(self.inner(self.first(x.flatten(1))).relu()).relu()
        return self.last(x + self.words(torch.tensor([1])))


FILE = "from tests.deploy.test_checkpoint import Tied\n\n\ndef build():\n    return Tied()\n"


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    (tmp_path / "m.py").write_text(FILE)
    model, images = Tied(), torch.randn(8, 1, 1, 4)
    made = quantize(model, [images], "w4")
    save(made, tmp_path / "q", recipe=f"{tmp_path / 'm.py'}:build")
    loaded = load(tmp_path / "q", trust=True)
    assert torch.equal(loaded(images), made(images))
    assert loaded.again._parameters["weight"] is loaded.inner._parameters["weight"]
    assert loaded.words._parameters["weight"] is loaded.last._parameters["weight"]
    head = read_head(tmp_path / "q")
    assert set(head.packed) == {"first.weight", "inner.weight"}
    assert head.tied["again.weight"] == "inner.weight"
    entries, _ = read_weights(tmp_path / "q")
    assert ("last.weight" in entries) != ("words.weight" in entries)  # in float, as the embedding reads it


def test_code_is_run_only_when_trusted(quantized, tmp_path):
    model, _, images = quantized
    ran = tmp_path / "ran"
    (tmp_path / "m.py").write_text(
        f"import timm\nopen({str(ran)!r}, 'w').close()\n\n\ndef build():\n"
        f"    return timm.create_model({quantized[1]['architecture']!r}, **{quantized[1]['arguments']!r})\n"
    )
    save(model, tmp_path / "q.safetensors", recipe=f"{tmp_path / 'm.py'}:build", preprocessing=LOOKS)
    with pytest.raises(PlanishError, match=r"m\.py.*trust=True"):
        load(tmp_path / "q.safetensors")
    assert read_head(tmp_path / "q.safetensors").recipe["function"] == "build"
    assert not ran.exists()
    assert torch.equal(load(tmp_path / "q.safetensors", trust=True)(images), model(images))
    (tmp_path / "m.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    with pytest.raises(PlanishError, match="does not fit the architecture it names"):
        load(tmp_path / "q.safetensors", trust=True)


def test_a_file_with_overrides_and_layers_in_float(tmp_path):
    model, images = network("vit")
    plan = quantize(model, [images], "w3a4").planish_assignment
    name = next(p.name for p in plan.products if p.weight is not None)
    scheme = replace(plan.scheme, overrides=((name, "w5a6"),))
    made = quantize(model, [images], scheme, allow=("blocks.0.attn*",))
    save(made, tmp_path / "q", preprocessing=LOOKS)
    loaded = load(tmp_path / "q")
    assert loaded.planish_assignment == made.planish_assignment
    assert loaded.planish_assignment.allowed
    assert torch.equal(loaded(images), made(images))


def test_plain_weights_other_versions_and_torch_files(tmp_path):
    save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    save_weights(nn.Linear(2, 2), tmp_path / "old.safetensors", {"planish_quantized": "{}"})
    torch.save({"a": torch.ones(2)}, tmp_path / "t.pt")
    assert read_head(tmp_path / "w.safetensors") is None
    assert read_head(tmp_path / "t.pt") is None
    for name, words in (("w", "holds plain weights"), ("old", "has format version 0.*quantize the model again")):
        with pytest.raises(PlanishError, match=rf"{name}\.safetensors {words}"):
            load(tmp_path / f"{name}.safetensors")
    with pytest.raises(PlanishError, match="format version 0"):
        read_head(tmp_path / "old.safetensors")
    with pytest.raises(PlanishError, match="is a torch file"):
        load(tmp_path / "t.pt")


def test_a_recipe_that_does_not_build_the_model(quantized, tmp_path):
    model, recipe, _ = quantized
    other = {**recipe, "arguments": {**recipe["arguments"], "num_classes": 4}}
    with pytest.raises(PlanishError, match="the recipe does not build this model"):
        save(model, tmp_path / "q", recipe=other, preprocessing=LOOKS)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_unknown_origin(tmp_path):
    with pytest.raises(PlanishError, match=r"how to build this Linear.*recipe="):
        save(nn.Linear(2, 2), tmp_path / "q")
    model, images = network("resnet")
    model.reset_classifier(7)  # so that what timm has kept of its arguments is not right any more
    save(model, tmp_path / "q", preprocessing=LOOKS)
    assert torch.equal(load(tmp_path / "q")(images), model(images))


def test_a_recipe_with_the_right_shapes_and_the_wrong_function_is_noticed(tmp_path):
    model, _ = network("vit")
    recipe = copy.deepcopy(RECIPES["vit"])
    recipe["arguments"]["num_heads"] = 1
    (tmp_path / "q").write_text("before")
    with pytest.raises(PlanishError, match="computes something else"):
        save(model, tmp_path / "q", recipe=recipe, preprocessing=LOOKS)
    assert (tmp_path / "q").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(PlanishError, match=r"does not run on an image of \(3, 224, 224\).*preprocessing="):
        save(model, tmp_path / "q", preprocessing=Preprocessing())


def test_what_cannot_be_stored_exactly_is_refused(quantized, tmp_path):
    model, _, images = quantized
    broken = copy.deepcopy(model)
    next(iter(broken.parameters())).data.fill_(float("nan"))
    with pytest.raises(PlanishError, match="holds NaN"):
        save(broken, tmp_path / "q", preprocessing=LOOKS)
    half = quantize(network("resnet")[0], [images], "w8")
    for tap in (t for _, t in taps_of(half)):
        tap.scale = torch.full_like(tap.scale, 1e-9)  # below the numbers of float16
    with pytest.raises(PlanishError, match=r"cannot be told apart in torch\.float16"):
        save(half.half(), tmp_path / "q", preprocessing=LOOKS)
    assert list(tmp_path.iterdir()) == []


def test_saving_and_loading_leave_modes_and_random_numbers_alone(quantized, tmp_path):
    model, _, _ = quantized
    model.train()
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    save(model, tmp_path / "q", preprocessing=LOOKS)
    load(tmp_path / "q")
    assert torch.equal(torch.randn(2), expected)
    assert model.training


def test_the_networks_of_the_targets_are_small_enough(tmp_path):
    """Random weights: ResNet-18 at 4 bits takes at most 0.135 and at 2 bits 0.075 of its size in float."""
    model = timm.create_model("resnet18").eval()
    whole = sum(p.numel() * 4 for p in model.parameters())
    images = torch.randn(1, 3, 64, 64)
    for scheme, most in (("w4", 0.135), ("w2", 0.075)):
        fast = Scheme.parse(scheme)
        fast = replace(fast, weights=replace(fast.weights, observer="minmax"))
        save(quantize(model, [images], fast), tmp_path / "q", verify=False)
        assert (tmp_path / "q").stat().st_size <= most * whole
