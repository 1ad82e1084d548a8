"""Bad input: one sentence on stderr, exit status 2, no traceback, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch


def refused(ended, *words: str) -> None:
    assert ended.status == 2, (ended.status, ended.out, ended.err)
    assert "Traceback" not in ended.err
    assert ended.err.startswith("planish: ")
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


RUN = ["--arms", "given", "--methods", "rtn", "--schemes", "w4a4", "--out", "run"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schemes", "w9a0"], ("w9a0", "2 to 8")),
        (["--schemes", "w4a4,banana"], ("banana",)),
        (["--prepare", "banana"], ("banana",)),
        (["--arms", "given,round"], ("arm 'round'", "averaged")),
        (["--arms"], ("no arm",)),
        (["--methods", "magic"], ("'magic'", "rtn")),
        (["--arms", "flat", "--weight-noise", "loud"], ("weight-noise 'loud'", "residual")),
        (["--arms", "flat", "--activation-noise", "loud"], ("activation-noise 'loud'", "gaussian")),
        (["--arms", "flat", "--optimizer", "lion"], ("optimizer 'lion'", "adamw")),
        (["--arms", "flat", "--mixed-precision", "int1"], ("int1", "bf16")),
        (["--arms", "flat", "--epochs", "0"], ("epochs is 0",)),
        (["--arms", "flat", "--epochs", "-3"], ("epochs is -3",)),
        (["--arms", "flat", "--lr", "-0.1"], ("lr is -0.1",)),
        (["--arms", "flat", "--lr", "nan"], ("lr is nan",)),
        (["--arms", "flat", "--distillation", "-1"], ("distillation is -1",)),
        (["--arms", "flat", "--labels", "0"], ("labels is 0", "--distillation 1")),
        (["--batch-size", "0"], ("batch-size is 0",)),
        (["--workers", "-1"], ("workers is -1",)),
        (["--threads", "-1"], ("threads is -1",)),
        (["--seed", "-1"], ("seed is -1",)),
        (["--calibration-images", "0"], ("calibration-images is 0",)),
        (["--allow", "nothing*"], ("--allow 'nothing*' matches no matrix product",)),
    ],
)  # fmt: skip
def test_settings(tiny, planish, arguments, words):
    refused(planish("run", *tiny, *RUN, *arguments), *words)
    assert not Path("run").exists()
    if "--allow" not in arguments:
        assert list(Path().iterdir()) == []


def test_unknown_options_and_wrong_types(tiny, planish):
    for arguments in (["run", "--bits", "4"], ["run", "--epochs", "banana"], ["fly"]):
        ended = planish(*arguments)
        assert ended.status == 2
        assert "Traceback" not in ended.err + ended.out


def test_sizes_larger_than_the_data_are_fine(tiny, planish):
    ended = planish("run", *tiny, *RUN, "--arms", "flat", "--epochs", "1", "--batch-size", "1000")
    assert ended.status == 0, ended.err
    assert json.loads(Path("run/results.json").read_text())["protocol"]["calibration_images"] == 48


def make(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ("does not exist", "DIR/train/CLASS")),
        ("empty", ("is empty",)),
        ("flat", ("no class folders",)),
        ("single", ("one class only",)),
        ("broken", ("4 of 60 images cannot be read", "class0/0.png")),
        ("more", ("3 logits", "4 classes")),
    ],
)  # fmt: skip
def test_data(tiny, shared, planish, tmp_path, name, words):
    data = shared / "data"
    image = (data / "class0" / "0.png").read_bytes()
    place = tmp_path / name
    if name == "empty":
        place.mkdir()
    elif name == "flat":
        make(place, **{"a.png": image})
    elif name == "single":
        shutil.copytree(data / "class0", place / "only")
    elif name == "broken":
        shutil.copytree(data, place)
        for i in range(4):
            (place / "class0" / f"{i}.png").write_bytes(image[:60])
    elif name == "more":
        shutil.copytree(data, place)
        shutil.copytree(data / "class0", place / "class3")
    for command in (["run", *tiny, *RUN], ["quantize", *tiny], ["flatten", *tiny], ["evaluate", *tiny]):
        refused(planish(*command, "--data", place), *words)
    assert [p.name for p in tmp_path.iterdir()] == ([] if name == "missing" else [name])


def test_a_few_broken_images_are_named_and_skipped(tiny, shared, planish, tmp_path):
    shutil.copytree(shared / "data", tmp_path / "data")
    broken = tmp_path / "data" / "class1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    ended = planish("run", *tiny, *RUN, "--data", "data")
    assert ended.status == 0, ended.err
    assert "note: 1 of 60 images could not be read and were skipped: class1/3.png" in ended.out
    assert json.loads(Path("run/results.json").read_text())["protocol"]["images_skipped"] == 1
    events = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [list(event["reasons"]) for event in events if event["event"] == "images skipped"] == [["class1/3.png"]]


def test_an_image_that_vanishes_in_a_run_is_told_and_the_run_goes_on(tiny, shared, planish, tmp_path, monkeypatch):
    import planish.recipes.journey as journey

    shutil.copytree(shared / "data", tmp_path / "data")
    real, gone = journey.train_arm, []

    def vanishing(material, *arguments, **options):
        used = set(material.calibration.dataset.dataset.indices)  # what calibrates has to stay
        gone.append(next(sample for i, sample in enumerate(material.data.train.samples) if i not in used))
        gone[0].unlink()
        return real(material, *arguments, **options)

    monkeypatch.setattr(journey, "train_arm", vanishing)
    arguments = ["--arms", "tuned", "--epochs", "1", "--calibration-images", "6", "--data", "data"]
    with pytest.warns(UserWarning, match="another image of its class takes its place"):
        ended = planish("run", *tiny, *RUN, *arguments)
    assert ended.status == 0, ended.err
    assert f"note: 1 training images could not be read any more, and others of their class took their place: {gone[0]}"\
        in ended.out  # fmt: skip
    assert json.loads(Path("run/results.json").read_text())["protocol"]["images_replaced"] == 1


def test_models(tiny, shared, planish):
    file = shared / "tiny.py"
    for model, words in (
        (f"{file}:absent", ("no function 'absent'",)),
        (f"{file}:raising", ("raised KeyError",)),
        (f"{file}", ("name the function",)),
        ("nowhere.py:build", ("does not exist",)),
        ("resnet_18", ("no model 'resnet_18'", "resnet18")),
        (f"{file}:four", ("4 logits", "3 classes")),
        (f"{file}:Recurrent", ("rnn", "--allow 'rnn'")),
    ):
        refused(planish("run", *tiny, *RUN, "--model", model), *words)
        refused(planish("quantize", *tiny, "--model", model), *words)
    ended = planish("quantize", *tiny, "--model", f"{file}:Recurrent", "--allow", "rnn")
    assert ended.status == 0, ended.err
    assert "rnn" in ended.out
    ended = planish("evaluate", "quantized.safetensors", *tiny[2:], "--trust")
    assert ended.status == 0, ended.err


def test_a_failed_download_is_one_sentence(tiny, planish, monkeypatch):
    import timm

    def offline(*_, **__):
        raise OSError("connection refused")

    monkeypatch.setattr(timm, "create_model", offline)
    refused(planish("run", *tiny, *RUN, "--model", "resnet18"), "connection refused", "--weights FILE")


def test_weights(tiny, planish, tmp_path):
    from planish.models import save_weights

    save_weights({f"key{i}": torch.zeros(2) for i in range(5)}, tmp_path / "other.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:50])
    (tmp_path / "object.pkl").write_bytes(pickle.dumps({"a": Path("b")}))
    for file, words in (
        ("other.safetensors", ("conv1.weight is missing; conv1.bias is missing; norm.weight is missing)",)),
        ("short.safetensors", ("not a readable checkpoint",)),
        ("object.pkl", ("object.pkl",)),
    ):
        refused(planish("run", *tiny, *RUN, "--weights", file), *words)
        refused(planish("evaluate", *tiny, file), *words)
    refused(planish("run", *tiny, *RUN, "--weights", "absent.pt"), "absent.pt are not there")
    refused(planish("evaluate", *tiny, "absent.pt"), "absent.pt cannot be read: No such file")
    refused(planish("evaluate", *tiny, "a.pt", "--weights", "b.pt"), "not both")
    assert not (tmp_path / "run").exists()


def test_a_quantized_file_that_cannot_be_read(tiny, planish):
    assert planish("quantize", *tiny).status == 0
    refused(planish("evaluate", "quantized.safetensors", *tiny[2:]), "--trust")
    content = Path("quantized.safetensors").read_bytes()
    Path("short.safetensors").write_bytes(content[:-10])
    refused(planish("evaluate", "short.safetensors", *tiny[2:], "--trust"), "incomplete or damaged")
    Path("later.safetensors").write_bytes(content.replace(b'version\\":1', b'version\\":9'))
    refused(planish("evaluate", "later.safetensors", *tiny[2:], "--trust"), "format version 9")


def test_places_that_cannot_be_written(tiny, planish, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file/run", "/proc/planish/run"):
        refused(planish("run", *tiny, *RUN, "--out", place), "cannot write here")
    (tmp_path / "run").mkdir()
    refused(planish("run", *tiny, *RUN), "already there")
    for command in ("quantize", "flatten"):
        refused(planish(command, *tiny, "--out", "absent/q.safetensors"), "does not exist")
        refused(planish(command, *tiny, "--out", "run"), "is a folder")
        refused(planish(command, *tiny, "--out", "file"), "already there", "--overwrite")
    refused(planish("run", "--resume"), "no interrupted run")
    refused(planish("run", "--resume", "--out", "other"), "no interrupted run")


def test_a_loss_that_is_not_finite(tiny, planish):
    ended = planish("run", *tiny, *RUN, "--arms", "given,tuned", "--lr", "1e30", "--epochs", "3")
    refused(ended, "tuned: the loss became", "last good weights are in", ".run.partial")
    kept = {path.name for path in Path(".run.partial").iterdir()}
    assert {"given.safetensors", "given-w4a4-rtn.safetensors", "results.json", "tuned-last-good.safetensors"} <= kept
    weights = planish("evaluate", *tiny, ".run.partial/tuned-last-good.safetensors")
    assert weights.status == 0
    refused(planish("flatten", *tiny, "--lr", "1e30"), "the last good weights are in flat-last-good.safetensors")
    refused(planish("flatten", *tiny, "--lr", "1e30", "--epochs", "200", "--out", "x.safetensors"), "nan")
    assert not Path("x.safetensors.checkpoint").exists()  # refused by the first steps, which tell how long it takes


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(tiny, planish, small_disk):
    ended = planish("run", *tiny, *RUN, "--arms", "given,flat", "--epochs", "1", "--out", small_disk / "run")
    refused(ended, "disk")
    ended = planish("flatten", *tiny, "--epochs", "1", "--out", small_disk / "f.safetensors")
    refused(ended, "the disk is full: make room")


def test_a_read_only_folder(tiny, planish, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(planish("run", *tiny, *RUN, "--out", small_disk / "run"), "cannot write here")
    refused(planish("quantize", *tiny, "--out", small_disk / "q"), "cannot be written to")


@pytest.mark.parametrize("writer", ["save_weights", "save_checkpoint", "write_report"])
def test_a_disk_that_fills_up_leaves_what_was_done(tiny, planish, monkeypatch, writer):
    """Without a mount: the file system says no at one place after the other, and the run goes on afterwards."""
    import planish.recipes.journey as journey

    def full(*_, **__):
        raise OSError(28, os.strerror(28), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(journey, writer, full)
        refused(planish("run", *tiny, *RUN), "somewhere: No space left on device", "kept")
    ended = planish("run", "--resume", "--out", "run", "--trust")
    assert ended.status == 0, ended.err
