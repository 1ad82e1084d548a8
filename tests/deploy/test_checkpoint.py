"""Quantized models on disk: the same outputs after loading, and the size that their weights really have."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from planish.ptq.files import KEY, load_quantized, save_quantized, weights_megabytes
from safetensors.torch import save_file
from torch import nn

from planish.errors import PlanishError
from planish.models import Preprocessing, build, read_weights
from planish.ptq import quantize

LOOKS = Preprocessing((1, 32, 32), (0.5,), (0.5,), crop_pct=1.0)
RECIPES = {
    "resnet": {"source": "timm", "architecture": "test_resnet", "arguments": {"num_classes": 3, "in_chans": 1}},
    "vit": {"source": "timm", "architecture": "test_vit", "arguments": {
        "num_classes": 3, "in_chans": 1, "img_size": 32, "patch_size": 8}},
}  # fmt: skip


@pytest.fixture(params=list(RECIPES))
def quantized(request):
    recipe = RECIPES[request.param]
    torch.manual_seed(0)
    model = timm.create_model(recipe["architecture"], **recipe["arguments"]).eval()
    images = torch.randn(8, 1, 32, 32)
    with torch.no_grad():
        model.train()(images)  # BatchNorm statistics that are worth folding
    return quantize(model.eval(), [images], "w3a4"), recipe, images


def test_the_loaded_model_computes_the_same(quantized, tmp_path):
    model, recipe, images = quantized
    save_quantized(model, tmp_path / "q.safetensors", recipe, LOOKS, {"method": "rtn"})
    loaded, head = load_quantized(tmp_path / "q.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert head["preprocessing"] == LOOKS
    assert head["protocol"] == {"method": "rtn"}
    assert weights_megabytes(loaded) == weights_megabytes(model)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.again, self.last = (nn.Linear(n, m) for n, m in ((4, 8), (8, 8), (8, 8), (8, 3)))
        self.again.weight = self.inner.weight

    def forward(self, x):
        return self.last(self.again(self.inner(self.first(x)).relu()).relu())


def test_the_size_counts_a_tied_weight_once_and_every_scale():
    model = Tied()
    parameters = 4 * 8 + 8 * 8 + 8 * 3 + 8 + 8 + 8 + 3
    assert weights_megabytes(model) == pytest.approx(4e-6 * parameters)
    small = quantize(model, [torch.randn(4, 4)], "w4")
    weights = 4 * 8 * 1 + 8 * 8 * 0.5 + 8 * 3 * 1 + 4 * (8 + 8 + 8 + 3)  # first and last layer at 8 bits
    least, most = (
        weights + 4 * (8 + 8 + 3),
        weights + 4 * (8 + 8 + 3) + 4 * 8 + 16,
    )  # scales; the tied weight's twice at most
    assert least <= 1e6 * weights_megabytes(small) <= most


def test_what_is_not_quantized_is_refused(tmp_path):
    with pytest.raises(PlanishError, match=r"planish\.quantize"):
        save_quantized(nn.Linear(2, 2), tmp_path / "q", {}, LOOKS, {})


def test_plain_weights_are_not_a_quantized_model(tmp_path):
    from planish.models import save_weights

    save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    assert load_quantized(tmp_path / "w.safetensors") is None
    save_weights(nn.Linear(2, 2), tmp_path / "bad.safetensors", {KEY: "{"})
    with pytest.raises(PlanishError, match="metadata cannot be read"):
        load_quantized(tmp_path / "bad.safetensors")


def test_code_is_run_only_when_trusted(quantized, tmp_path):
    model, _, _ = quantized
    (tmp_path / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    recipe = {"source": "file", "path": str(tmp_path / "m.py"), "function": "build"}
    save_quantized(model, tmp_path / "q.safetensors", recipe, LOOKS, {})
    with pytest.raises(PlanishError, match=r"m\.py.*trust=True"):
        load_quantized(tmp_path / "q.safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_file_for_another_architecture(quantized, tmp_path):
    model, recipe, _ = quantized
    other = {**recipe, "arguments": {**recipe["arguments"], "num_classes": 4}}
    save_quantized(model, tmp_path / "q.safetensors", other, LOOKS, {})
    with pytest.raises(PlanishError, match="does not fit the architecture"):
        load_quantized(tmp_path / "q.safetensors")


def test_a_file_without_overrides_and_one_with_them(quantized, tmp_path):
    model, recipe, images = quantized
    save_quantized(model, tmp_path / "q.safetensors", recipe, LOOKS, {})
    state, metadata = read_weights(tmp_path / "q.safetensors")
    head = json.loads(metadata[KEY])
    assert head["scheme"].pop("overrides") == []
    save_file(state, tmp_path / "old.safetensors", {KEY: json.dumps(head)})  # as before there were any
    old, _ = load_quantized(tmp_path / "old.safetensors")
    assert old.planish_assignment.scheme == model.planish_assignment.scheme
    name = next(p.name for p in model.planish_assignment.products if p.weight is not None)
    scheme = replace(model.planish_assignment.scheme, overrides=((name, "w5a6"),))
    other = quantize(build(recipe), [images], scheme)
    save_quantized(other, tmp_path / "mixed.safetensors", recipe, LOOKS, {})
    loaded, _ = load_quantized(tmp_path / "mixed.safetensors")
    assert loaded.planish_assignment.scheme == scheme
    with torch.no_grad():
        assert torch.equal(loaded(images), other(images))
