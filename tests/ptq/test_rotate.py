"""Rotations folded into the weights: the float network stays what it was, its operands lose their outliers."""

import copy

import pytest
import timm
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.network import assign, watch
from planish.network.hadamard import random_rotation
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.passes import Calibration, run_logits
from planish.ptq.rotate import Rotate
from tests.network.zoo import build

ARGUMENTS = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "in_chans": 1,
    "num_classes": 4,
}
X = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(**options):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, **options}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def apply(model, x=X, **options):
    """The model after the pass, and the texts of its notes."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    work = Calibration(twin, [x], assign(watch(twin, x[:1]), "w4a4"), run_logits(twin, [x]))
    Rotate(**options)(work)
    return work, [line["text"] for line in work.log]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.3, "qkv_bias": False},
        {"global_pool": "avg", "class_token": False},
        {"num_heads": 8},  # heads of width 3, for which there is no Hadamard matrix
        {"qk_norm": True},
    ],
)
def test_outputs_stay_the_same_and_every_product_changes(options):
    model = vit(**options)
    work, _ = apply(model)
    (now,) = run_logits(work.model, [X])
    assert (now - work.reference[0]).abs().max() < 1e-4 * work.reference[0].abs().max()
    before, after = model.state_dict(), work.model.state_dict()
    for name in (
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.1.mlp.fc2.bias",
        "head.bias",
    ):
        assert not torch.equal(before[name], after[name])


def test_heads_are_turned_as_the_twin_says():
    """Per head: R Wq, R Wk with one R; S Wv and Wproj S^T with another."""
    model = vit()
    work, notes = apply(model, stream=False, seed=5)
    assert notes == []
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    for i in range(2):
        before, after = model.blocks[i].attn, work.model.blocks[i].attn
        for_qk, for_v = ([random_rotation(12, g).float() for _ in range(2)] for g in (first, second))
        for head in range(2):
            columns = slice(12 * head, 12 * head + 12)
            for third, turn in ((0, for_qk[head]), (1, for_qk[head]), (2, for_v[head])):
                rows = slice(24 * third + 12 * head, 24 * third + 12 * head + 12)
                torch.testing.assert_close(after.qkv.weight[rows], turn @ before.qkv.weight[rows])
                torch.testing.assert_close(after.qkv.bias[rows], turn @ before.qkv.bias[rows])
            torch.testing.assert_close(after.proj.weight[:, columns], before.proj.weight[:, columns] @ for_v[head].T)
        assert torch.equal(after.proj.bias, before.proj.bias)
        assert isinstance(work.model.blocks[i].norm1, nn.LayerNorm)


def test_the_plan_is_made_anew_and_keeps_its_formats():
    model = vit(init_values=0.1)
    before = assign(watch(model, X[:1]), "w4a4")
    work, _ = apply(model)
    assert work.assignment.formats == before.formats
    planned = {p.module: [s.shape for s in p.sites] for p in work.assignment.products}
    assert planned == {p.module: [s.shape for s in p.sites] for p in before.products}
    assert isinstance(work.model.blocks[0].norm1, nn.RMSNorm)


def test_the_seed_decides():
    model = vit()
    first, again, other = (apply(model, seed=seed)[0].model for seed in (0, 0, 1))
    assert same_state(first, again)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_an_outlier_channel_costs_less():
    """One channel of the stream that is large for every token takes the range from the rest, until it is spread."""
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[0] += 10

    def error(passes):
        ours = quantize(model, [X], "w8a4", [*passes, Calibrate(), Round()])
        (now,), (then,) = run_logits(ours, [X]), run_logits(model, [X])
        return (now - then).square().mean()

    assert error([Rotate(heads=False)]) < 0.5 * error([])


def test_swin_only_has_its_heads_turned():
    model, x = build("swin")
    work, notes = apply(model, x)
    assert notes == ["the model has no list of blocks, so its residual stream stays as it is"]
    torch.testing.assert_close(run_logits(work.model, [x])[0], work.reference[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(work.model.layers[0].blocks[0].attn.qkv.weight, model.layers[0].blocks[0].attn.qkv.weight)
    assert torch.equal(work.model.layers[0].blocks[0].mlp.fc1.weight, model.layers[0].blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3", "convolutions"])
def test_where_there_is_nothing_to_turn_it_says_so(name):
    model, x = build(name)
    work, notes = apply(model, x)
    assert same_state(work.model, model)
    assert len(notes) == 2
    assert "residual stream stays" in notes[0].replace("the stream", "the residual stream")
    assert "no heads are turned" in notes[1]
    assert all(line["event"] == "note" and line["pass"] == "rotate" for line in work.log)


@pytest.mark.parametrize("name", ["beit", "eva"])  # biases beside qkv; eva turns queries and keys by their position
def test_what_would_change_the_outputs_is_left_out(name):
    model, x = build(name)
    work, notes = apply(model, x)
    assert same_state(work.model, model)
    assert [text.split(" changes the outputs")[0] for text in notes[1:]] == [
        "turning queries and keys", "turning values"
    ]  # fmt: skip
    assert "blocks.0.norm1 is not a LayerNorm that only linear layers read" in notes[0]


def test_a_pool_that_does_not_commute_leaves_the_stream_alone():
    work, notes = apply(vit(global_pool="max"), heads=False)
    assert len(notes) == 1
    assert "turning residual stream changes the outputs" in notes[0]
    assert isinstance(work.model.blocks[0].norm1, nn.LayerNorm)


@pytest.mark.parametrize("options", [{"scale_attn_norm": True}, {"qk_norm": True}])
def test_norms_inside_attention_keep_their_operands(options):
    _, notes = apply(vit(**options), stream=False)
    assert len(notes) == 1
    assert "every attention normalizes" in notes[0]


@pytest.mark.parametrize("options", [{}, {"init_values": 0.2, "qkv_bias": False, "reg_tokens": 1}])
def test_save_and_load(options, tmp_path):
    model = vit(**options)
    quantized = quantize(model, [X], "w4a4", [Rotate(), FoldBatchNorm(), Calibrate(), Round()])
    recipe = {"source": "timm", "architecture": "vit_tiny_patch16_224", "arguments": {**ARGUMENTS, **options}}
    looks = Preprocessing((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
    save(quantized, tmp_path / "q.safetensors", recipe=recipe, preprocessing=looks, protocol={"method": "rotate"})
    loaded = load(tmp_path / "q.safetensors")
    assert torch.equal(run_logits(loaded, [X])[0], run_logits(quantized, [X])[0])
    assert isinstance(loaded.blocks[0].norm1, nn.RMSNorm)


def test_bad_options_and_a_late_place_in_the_list():
    with pytest.raises(PlanishError, match="stream of rotate is 1: give True or False"):
        Rotate(stream=1)
    with pytest.raises(PlanishError, match="seed of rotate is -1: give a whole number"):
        Rotate(seed=-1)
    with pytest.raises(PlanishError, match="rotate changes the network in float"):
        quantize(vit(), [X], "w4a4", [Calibrate(), Rotate()])
