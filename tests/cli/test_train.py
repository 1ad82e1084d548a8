"""`planish train`: what it writes, where it starts, what it refuses, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from planish.deploy.checkpoint import load
from planish.qat.fpq import FPQ

QUICK = ["--epochs", "2", "--calibration-images", "24"]


def test_it_writes_what_evaluate_reads(tiny, planish, tmp_path):
    ended = planish("train", *tiny, *QUICK, "--scheme", "w2a4", "--method", "fpq", "--option", "p=0.3", "csd=2")
    assert ended.status == 0, ended.err
    lines = ("float: top-1", "w2a4 by rtn: top-1", "w2a4 trained: top-1", "w2a4 by fpq (p=0.3, csd=2.0)")
    for line in lines:
        assert line in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained.json", "trained.jsonl", "trained.safetensors"]
    card = json.loads(Path("trained.json").read_text())
    protocol = card["protocol"]
    assert protocol["options"] == asdict(FPQ(p=0.3, csd=2.0))  # also those that are the defaults of today
    assert protocol["epochs"] == 2
    assert protocol["method"] == "fpq"
    assert protocol["seconds"] > 0
    assert "torch" in card["environment"]
    top1 = protocol["rows"][2]["top1"]
    measured = planish("evaluate", "trained.safetensors", "--trust", *tiny[2:])
    assert measured.status == 0, measured.err
    assert f"{100 * top1:.2f}%" in measured.out


def test_an_option_may_stand_alone_or_with_others(tiny, planish):
    for i, given in enumerate(
        (["p=0.3", "csd=2"], ["p=0.3", "--option", "csd=2"], ["p=0.5", "csd=2", "--option", "p=0.3"])
    ):
        command = ["train", *tiny, *QUICK, "--epochs", "1", "--method", "fpq", "--out", f"{i}.safetensors"]
        ended = planish(*command, "--option", *given)
        assert ended.status == 0, ended.err
        options = json.loads(Path(f"{i}.json").read_text())["protocol"]["options"]
        assert (options["p"], options["csd"]) == (0.3, 2.0)


def test_oscillation_before_and_after_annealing(tiny, planish):
    ended = planish("train", *tiny, *QUICK, "--scheme", "w2a4", "--method", "ofq", "--option", "annealing=0.5")
    assert ended.status == 0, ended.err
    assert "% of the weights oscillate" in ended.out
    report = json.loads(Path("trained.json").read_text())["oscillation"]
    for when in ("before_annealing", "after"):
        assert 0 <= report[when]["oscillating"] <= 1
        assert sum(report[when]["histogram"]) == pytest.approx(1)
        assert list(report[when]["layers"]) == ["conv2.weight"]
    ended = planish("train", *tiny, *QUICK, "--scheme", "w8a8", "--epochs", "1", "--out", "eight.safetensors")
    assert ended.status == 0, ended.err
    assert json.loads(Path("eight.json").read_text())["oscillation"] == {}


def test_starts(tiny, planish):
    assert planish("quantize", *tiny, "--scheme", "w4a4", "--out", "q.safetensors").status == 0
    assert planish("flatten", *tiny, "--epochs", "1", "--scheme", "w4a4", "--out", "flat.safetensors").status == 0
    for i, start in enumerate((["flat"], ["flat", "--flat-epochs", "1"], ["q.safetensors"])):
        ended = planish("train", *tiny, *QUICK, "--start", *start, "--method", "kd", "--out", f"{i}.safetensors")
        assert ended.status == 0, ended.err
        protocol = json.loads(Path(f"{i}.json").read_text())["protocol"]
        assert protocol["flat_epochs"] == (1 if start[0] == "flat" else 0)
        assert ("start_checkpoint" in protocol) == (start[0] == "q.safetensors")
        middle = "w4a4 flat by rtn" if start[0] == "flat" else "w4a4 at the start"
        assert [row["name"] for row in protocol["rows"]] == ["float", "w4a4 by rtn", middle, "w4a4 trained"]
        assert f"{middle}: top-1" in ended.out
    again = planish("train", *tiny, *QUICK, "--start", "2.safetensors", "--out", "again.safetensors")
    assert again.status == 0, again.err  # what planish train wrote is a start, too
    ended = planish("train", *tiny, *QUICK, "--weights", "flat.safetensors", "--out", "w.safetensors")
    assert ended.status == 0, ended.err


def test_the_network_may_stand_first(tiny, planish):
    ended = planish("train", tiny[1], *tiny[2:], *QUICK, "--epochs", "1")
    assert ended.status == 0, ended.err


def test_images_without_labels(tiny, planish, shared):
    ended = planish(
        "train", *tiny, *QUICK, "--method", "cr", "--option", "ramp=0", "--unlabelled", shared / "data" / "class0"
    )
    assert ended.status == 0, ended.err
    plain = planish("train", *tiny, *QUICK, "--method", "cr", "--option", "ramp=0", "--out", "other.safetensors")
    assert plain.status == 0, plain.err
    protocols = [json.loads(Path(name).read_text())["protocol"] for name in ("trained.json", "other.json")]
    assert ["unlabelled_hash" in protocol for protocol in protocols] == [True, False]
    a, b = (load(Path(name), trust=True) for name in ("trained.safetensors", "other.safetensors"))
    assert not torch.equal(a.head._parameters["weight"], b.head._parameters["weight"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "magic"], ("training method 'magic' is not known", "lsq")),
        (["--scheme", "w9a0"], ("w9a0",)),
        (["--option", "q=1"], ("lsq has no option 'q'", "task")),
        (["--option", "task"], ("NAME=VALUE",)),
        (["--option", "task=much"], ("option task of lsq is 'much': give a number",)),
        (["--start", "nowhere"], ("start is 'nowhere': give given or flat, or a file",)),
        (["--flat-epochs", "1"], ("--start flat",)),
        (["--start", "flat", "--epochs", "1"], ("flat-epochs is 0 of 1 epochs",)),
        (["--option", "task=-1"], ("task=-1.0", "weights are not negative")),
        (["--option", "temperature=0"], ("temperature is positive",)),
        (["--method", "fpq", "--option", "p=7"], ("7.0", "[0, 1]")),
        (["--method", "fpq", "--option", "p=7", "--start", "flat"], ("7.0", "[0, 1]")),
        (["--option", "task=0", "--start", "flat"], ("nothing to minimise",)),
        (["--method", "mec", "--option", "order=two"], ("option order of mec is 'two': give a whole number",)),
        (["--method", "mec", "--option", "order=2.5"], ("give a whole number",)),
        (["--method", "cr", "--unlabelled", "nowhere"], ("unlabelled images nowhere does not exist",)),
        (["--unlabelled", "nowhere"], ("lsq takes no images without labels",)),
        (["--out", "t.json"], ("where the protocol goes", "t.safetensors")),
        (["convnet"], ("two models are named, convnet and",)),
        (["--epochs", "0"], ("epochs is 0",)),
        (["--out", "nowhere/t.safetensors"], ("the folder nowhere does not exist",)),
    ],
)
def test_what_cannot_work_is_refused_at_once(tiny, planish, tmp_path, arguments, words):
    ended = planish("train", *tiny, *arguments)
    assert ended.status == 2
    for word in words:
        assert word in ended.err
    assert ended.err.startswith("planish: ")
    assert ended.err.count("\n") == 1
    assert "flattening" not in ended.out
    assert list(tmp_path.iterdir()) == []


def test_a_protocol_that_is_there_is_not_replaced_unasked(tiny, planish):
    Path("t.json").write_text("mine")
    ended = planish("train", *tiny, *QUICK, "--out", "t.safetensors")
    assert ended.status == 2
    assert "t.json, which is already there" in ended.err
    assert Path("t.json").read_text() == "mine"
    assert planish("train", *tiny, *QUICK, "--epochs", "1", "--out", "t.safetensors", "--overwrite").status == 0
    assert Path("t.json").read_text() != "mine"


def test_a_command_that_was_refused_does_not_stand_in_the_way_of_the_next(tiny, planish, tmp_path):
    assert planish("quantize", *tiny, "--scheme", "w4a4", "--out", "q.safetensors").status == 0
    long = ["--epochs", "200", "--method", "kd", "--option", "temperature=0"]  # so long that it is estimated first
    for arguments in (["--scheme", "w2a2", "--start", "q.safetensors"], ["--option", "task=0"], ["--lr", "1e30"], long):
        ended = planish("train", *tiny, *QUICK, *arguments)
        assert ended.status == 2
        assert not (tmp_path / "trained.safetensors.checkpoint").exists()
    ended = planish("train", *tiny, *QUICK, "--scheme", "w4a4", "--start", "q.safetensors")
    assert ended.status == 0, ended.err


def test_the_last_good_weights_can_be_loaded(tiny, planish):
    ended = planish("train", *tiny, *QUICK, "--lr", "1e30")
    assert ended.status == 2
    assert "the last good weights are in trained-last-good.safetensors" in ended.err
    ended = planish("evaluate", *tiny, "--weights", "trained-last-good.safetensors")
    assert ended.status == 0, ended.err


def test_a_start_of_another_architecture_is_refused_and_its_code_not_run(tiny, planish, tmp_path):
    program = (
        (Path(tiny[1].rpartition(":")[0]).read_text()).replace("Conv2d(8, 8,", "Conv2d(8, 4,").replace("128", "64")
    )
    Path("other.py").write_text(program + "\nopen('ran', 'w').close()\n")
    other = ["--model", "other.py:build", *tiny[2:]]
    assert planish("quantize", *other, "--scheme", "w4a4", "--out", "q.safetensors").status == 0
    (tmp_path / "ran").unlink()
    ended = planish("train", *tiny, *QUICK, "--start", "q.safetensors")
    assert ended.status == 2
    assert "other.py:build" in ended.err
    assert "tiny.py:build" in ended.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "trained.safetensors.checkpoint").exists()


def test_a_start_of_another_scheme_or_without_quantizers(tiny, planish):
    assert planish("quantize", *tiny, "--scheme", "w4a4", "--out", "q.safetensors").status == 0
    ended = planish("train", *tiny, *QUICK, "--scheme", "w2a2", "--start", "q.safetensors")
    assert ended.status == 2
    assert "quantized already, by w4a4" in ended.err
    assert planish("flatten", *tiny, "--epochs", "1", "--out", "flat.safetensors").status == 0
    ended = planish("train", *tiny, *QUICK, "--start", "flat.safetensors")
    assert ended.status == 2
    assert "give it as --weights" in ended.err


def test_methods_shows_the_options_of_one(planish):
    listing = planish("methods")
    assert "training methods (--method of planish train)" in listing.out
    ended = planish("methods", "fpq")
    assert ended.status == 0
    assert "p=0.1" in ended.out
    assert "probability" in ended.out
    listed = planish("methods", "rtn").out
    assert "its passes:" in listed
    assert [line.split()[0] for line in listed.splitlines()[1:]] == ["fold-batchnorm", "calibrate", "round"]
    listed = planish("methods", "ofq").out.splitlines()
    (small,) = [line for line in listed if line.split()[:1] == ["DeiT-S"] and " at w2a2 " not in line]
    assert "--epochs 330 --batch-size 800 --optimizer adamw --lr 0.00032 --weight-decay 0 " in small
    assert small.endswith("each image three times, no average of the weights]")
    ended = planish("methods", "magic")
    assert ended.status == 2
    assert "'magic' is not known: choose one of rtn, matched, gptq" in ended.err
    assert "mec, ofq" in ended.err


def test_it_does_not_go_on_from_another_start(zygote, options, tmp_path):
    quantize = ["quantize", *options, "--scheme", "w4a4", "--out", "q.safetensors", "--overwrite"]
    command = ["train", *options, "--epochs", "200", "--start", "q.safetensors"]
    assert zygote.run(tmp_path, [*quantize, "--calibration-images", "16"]).status == 0
    ended = zygote.run(tmp_path, command, kill=signal.SIGINT, after=4, delay=0.5)
    assert ended.status == 130, ended.err
    assert zygote.run(tmp_path, [*quantize, "--calibration-images", "8"]).status == 0
    ended = zygote.run(tmp_path, command)
    assert ended.status == 2
    assert "start_checkpoint was" in ended.err


def test_it_goes_on_where_it_was_stopped(zygote, options, tmp_path):
    command = ["train", *options, "--epochs", "4", "--scheme", "w3a3", "--method", "kd", "--start", "flat"]
    ended = zygote.run(tmp_path, [*command, "--out", "whole.safetensors"])
    assert ended.status == 0, ended.err
    for after, number in ((2, signal.SIGINT), (3, signal.SIGTERM)):
        out = f"{number}.safetensors"
        ended = zygote.run(tmp_path, [*command, "--out", out], kill=number, after=after, delay=0.05)
        assert ended.status == 130, ended.err
        assert not (tmp_path / out).exists()
        ended = zygote.run(tmp_path, [*command, "--out", out])
        assert ended.status == 0, ended.err
        files = (tmp_path / out, tmp_path / "whole.safetensors")
        state, expected = (load(file, trust=True).state_dict() for file in files)
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert not (tmp_path / f"{out}.checkpoint").exists()
