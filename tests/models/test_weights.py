"""Checkpoints: what is read, what is refused and in which words, and how they are written."""

import argparse
import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from planish.errors import PlanishError
from planish.models import fit_weights, read_weights, save_weights, state_hash
from planish.ptq import quantize


def model(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def test_every_wrapping_gives_the_same_tensors(tmp_path):
    state = model().state_dict()
    contents = [
        state,
        {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        {"model": {f"module.{key}": value for key, value in state.items()}},
        {f"_orig_mod.{key}": value for key, value in state.items()},
    ]
    for i, content in enumerate(contents):
        path = tmp_path / f"{i}.pth"
        torch.save(content, path)
        got, metadata = read_weights(path)
        assert list(got) == list(state)
        assert all(torch.equal(got[k], state[k]) for k in state)
        assert metadata == {}
    save_file(state, tmp_path / "s.safetensors", metadata={"a": "b"})
    got, metadata = read_weights(tmp_path / "s.safetensors")
    assert got.keys() == state.keys()
    assert metadata == {"a": "b"}


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb_went_off",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": model().state_dict(), "x": Bomb()}, "bomb.pth")
    with pytest.raises(PlanishError, match="can run code"):
        read_weights("bomb.pth")
    assert not (tmp_path / "bomb_went_off").exists()


def test_files_that_are_no_checkpoints_get_one_sentence(tmp_path):
    torch.save(model().state_dict(), tmp_path / "whole.pth")
    save_weights(model(), tmp_path / "whole.safetensors")
    for kind in ("pth", "safetensors"):
        raw = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "none.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    cases = {"cut.pth": "readable", "cut.safetensors": "readable", "text.pth": "readable", "none.pth": "readable"}
    cases |= {"list.pth": "found a list", "absent.pth": "not there", ".": "a folder"}
    for name, words in cases.items():
        with pytest.raises(PlanishError, match=words) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_the_first_three_differences_are_named():
    state = dict(model(width=5).state_dict())
    del state["0.bias"]
    state["head.extra"] = torch.zeros(1)
    with pytest.raises(PlanishError) as caught:
        fit_weights(model(), state, name="tiny", source="x.pth")
    assert "x.pth does not fit tiny: 8 keys differ" in str(caught.value)
    for words in ("0.bias is missing", "head.extra is unexpected", "0.weight has shape (5, 3) instead of (4, 3)"):
        assert words in str(caught.value)


def test_a_quantized_model_is_no_file_of_weights():
    quantized = quantize(model(), [torch.randn(4, 3)], "w8a8", "rtn")
    with pytest.raises(PlanishError, match=r"x\.pth holds a quantized model, and weights in float are due here"):
        fit_weights(model(), quantized.state_dict(), name="tiny", source="x.pth")


def test_nan_is_refused():
    state = model().state_dict()
    state["2.bias"][0] = float("nan")
    with pytest.raises(PlanishError, match=r"NaN in 2\.bias"):
        fit_weights(model(), state, name="tiny", source="x.pth")


def test_hash_sees_values_names_and_types_but_not_layout():
    one, two = model(), model()
    two[0].weight.data = two[0].weight.data.t().contiguous().t()
    assert state_hash(one) == state_hash(two)
    assert len(state_hash(one)) == 16
    assert state_hash(nn.Sequential(*reversed(model()))) != state_hash(one) != state_hash(model().half())
    two[2].bias.data[0] += 1e-6
    assert state_hash(one) != state_hash(two)
    zeros = [nn.Linear(2, 1).requires_grad_(False).to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    for layer in zeros:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert state_hash(zeros[0]) != state_hash(zeros[1])  # the bytes are the same


def test_saving_tied_and_strided_tensors(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net[0].bias.data = torch.randn(4, 2)[:, 0]
    save_weights(net, tmp_path / "w.safetensors", {"k": "v"})
    got = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(got[key], value) for key, value in net.state_dict().items())
    assert read_weights(tmp_path / "w.safetensors")[1] == {"k": "v"}


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(model(0), path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanishError, match=r"w\.safetensors could not be written: the disk is full"):
        save_weights(model(1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(PlanishError, match=r"absent.*could not be written"):
        save_weights(model(), tmp_path / "absent" / "w.safetensors")


@pytest.mark.parametrize("header_length", [0x80, 0x4B50])
def test_a_header_length_that_looks_like_another_format(tmp_path, header_length):
    """The first bytes of a safetensors file are a length: 0x80 begins a pickle, 0x4B50 ("PK") a zip archive."""
    entry = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"k":"v"}}'
    header = entry.ljust(header_length)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f")
    state, metadata = read_weights(path)
    assert state["a"].item() == 1.0
    assert metadata == {"k": "v"}


def test_a_link_that_waits_under_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / f".w.safetensors.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    save_weights({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert (tmp_path / "precious").read_bytes() == b"kept"
    assert not (tmp_path / "w.safetensors").is_symlink()
