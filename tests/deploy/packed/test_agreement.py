"""Files whose checksum is right and whose parts do not agree: refused before the architecture is allocated."""

from __future__ import annotations

import struct

import pytest

from benchmarks.checkpoint_mutations import Base, sealed
from planish.deploy import checkpoint
from planish.deploy.packed.agreement import broadcasts, groups, grow, shrink
from planish.errors import PlanishError
from planish.network import Site
from planish.ptq import quantize
from planish.quantizers import fit_grid
from planish.scheme import Format
from tests.deploy.tiny import LOOKS, network

SCALE = "blocks.0.mlp.fc1.planish_taps.weight.scale"
INPUT = "blocks.0.mlp.fc1.planish_taps.input.scale"
WEIGHT = "blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("agreement") / "q"
    model, images = network("vit")
    made = quantize(model, [images], "w3a4")
    checkpoint.save(made, path, preprocessing=LOOKS)
    return Base("vit", path.read_bytes(), images, made(images))


def put(name, value, place=0):
    """Overwrite a number of a tensor."""

    def change(header, head, data):
        begin = header[name]["data_offsets"][0] + 4 * place
        data[begin : begin + 4] = struct.pack("<f", value)

    return change


def one_byte_less(header, head, data):
    """The last byte of a packed weight becomes a tensor of its own."""
    key = next(k for k, (_, _, shape) in head["packed"].items() if k == "blocks.0.attn.qkv.weight")
    header[key]["shape"] = [header[key]["shape"][0] - 1]
    header[key]["data_offsets"][1] -= 1
    end = header[key]["data_offsets"][1]
    header["x"] = {"dtype": "U8", "shape": [1], "data_offsets": [end, end + 1]}


def site(head, name):
    sites = [(s.get("owner", p["module"]), s) for p in head["quantized"]["products"] for s in p["sites"]]
    return next(s for owner, s in sites if f"{owner}.{s['slot']}" == name)


def rename(old, new):
    def change(header, head, data):
        header[new] = header.pop(old)

    return change


def head_at(*place, value):
    def change(header, head, data):
        target = head
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value

    return change


CHANGES = [
    (put(SCALE, float("nan"), 3), "scales of 'blocks.0.mlp.fc1.weight' are not positive and finite"),
    (put(SCALE, -1.0), "not positive and finite"),
    (put(SCALE, 0.0), "not positive and finite"),
    (put(SCALE, float("inf")), "not positive and finite"),
    (put(SCALE, 1e-40), "not positive and finite"),
    (put(INPUT, float("nan")), "scales of 'blocks.0.mlp.fc1.input'"),
    (put(INPUT.replace("scale", "zero_point"), 0.5), "are not whole numbers among its codes"),
    (put(INPUT.replace("scale", "zero_point"), 1e6), "are not whole numbers among its codes"),
    (put("blocks.0.mlp.fc1.bias", float("nan")), "'blocks.0.mlp.fc1.bias' holds NaN"),
    (one_byte_less, r"codes of 3 bits, expected \d+ bytes"),
    (rename(SCALE, "x"), "'x' is not in it"),
    (rename(SCALE, "planish_taps.x"), "has no scale and zero point|belongs to no site"),
    (rename("blocks.0.mlp.fc1.bias", "x"), "'blocks.0.mlp.fc1.bias' is missing"),
    (rename("blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc1.bias2"), "is missing"),
    (head_at("packed", WEIGHT, 0, value="blocks.0.mlp.fc2.weight"), "which is not that of a weight"),
    (head_at("packed", WEIGHT, 2, value=[64, 64]), "another shape or type than that of its site"),
    (head_at("packed", WEIGHT, 1, value="I32"), "another shape or type"),
    (head_at("packed", "x", value=["x", "F32", [3]]), "which is not that of a weight"),
    (head_at("constant", WEIGHT, value=["F32", [3], 0.0]), "is a constant and a tensor"),
    (head_at("constant", "x", value=["F32", [2**40], 0.0]), "its constants would take"),
    (head_at("constant", "x", value=["F32", [3], 0.0]), "'x' is not in it"),
    (head_at("tied", WEIGHT, value="head.weight"), "is tied to"),
    (head_at("tied", "x", value="y"), "is tied to"),
    (lambda h, head, d: site(head, WEIGHT).update(shape=[64, 64]), "another shape or type"),
    (lambda h, head, d: site(head, WEIGHT).update(owner="x"), "which is not that of a weight"),
    (lambda h, head, d: site(head, "blocks.0.mlp.fc1.input").update(slot="forward"), "which no tap can have"),
    (lambda h, head, d: site(head, "blocks.0.mlp.fc1.input").update(owner="no"), "it has no module 'no'"),
    (lambda h, head, d: site(head, "blocks.0.mlp.fc1.input").update(shape=[]), None),
    (lambda h, head, d: head["quantized"]["products"][1].update(module="no"), "no"),
    (lambda h, head, d: head["recipe"]["arguments"].update(num_classes=4), "'head.bias' has"),
    (lambda h, head, d: head["recipe"]["arguments"].update(in_chans=2000), "patch_embed"),
    (lambda h, head, d: head["recipe"].update(architecture="resnet18", arguments={}), "is missing"),
    (lambda h, head, d: head.update(quantized=None), "is packed by the grid of"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_parts_that_do_not_agree(base, change, words, tmp_path, monkeypatch):
    header, head, data = base.copy()
    change(header, head, data)
    (tmp_path / "m.safetensors").write_bytes(sealed(header, head, bytes(data)))
    if words is None:  # the shape of an activation is only told
        checkpoint.load(tmp_path / "m.safetensors")
        return
    monkeypatch.setattr(checkpoint, "built", None)  # nothing is allocated
    with pytest.raises(PlanishError, match=words) as caught:
        checkpoint.load(tmp_path / "m.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "m.safetensors"))


def test_broadcasting():
    for shape, to, fits in (((), (3,), True), ((3, 1), (2, 3, 4), True), ((2,), (3,), False), ((1, 3), (3,), False)):
        assert broadcasts(shape, to) is fits


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(8, 12, 2), (8, 12)])
def test_scales_by_groups_are_stored_once(shape, axis):
    import torch

    fmt = Format(4, "group", symmetric=False, group_size=4)
    weight = torch.randn(shape)
    where = Site("a.weight", "a", "weight", "weight", shape, axis, True)
    for values in fit_grid(weight, fmt, channel_axis=axis)[:2]:
        small = shrink(values, where, fmt)
        assert small.shape == groups(where, fmt) == (weight.numel() // 4,)
        assert torch.equal(grow(small, where, fmt), values)
        mixed = values.clone()
        mixed.view(-1)[0] += 1
        assert shrink(mixed, where, fmt) is mixed
