"""The commands as a new user gives them: what they print, what they leave, and that all of it fits together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from planish.models import read_weights


@pytest.fixture(scope="module")
def finished(shared, options, tmp_path_factory):
    """A finished run, and what it printed."""
    import contextlib
    import io

    from planish.cli.main import main

    out = tmp_path_factory.mktemp("finished") / "run"
    printed = io.StringIO()
    arguments = [
        "--arms",
        "given,flat",
        "--methods",
        "rtn",
        "--schemes",
        "w4a4",
        "W3A3",
        "--epochs",
        "2",
        "--out",
        str(out),
    ]
    with contextlib.redirect_stdout(printed):
        assert main(["run", *options, *arguments]) == 0
    return out, printed.getvalue()


def test_the_run_folder_is_complete(finished):
    out, _ = finished
    names = {"config.toml", "log.jsonl", "results.json", "report.html"}
    names |= {f"{arm}{rest}.safetensors" for arm in ("given", "flat") for rest in ("", "-w4a4-rtn", "-w3a3-rtn")}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    results = json.loads((out / "results.json").read_text())
    assert set(results) >= {"protocol", "environment", "rows", "flatness"}
    keys = [(row["arm"], row["scheme"], row["method"]) for row in results["rows"]]
    assert keys == [(arm, *rest) for arm in ("given", "flat") for rest in
                    (("fp32", "none"), ("w4a4", "rtn"), ("w3a3", "rtn"))]  # fmt: skip
    row = results["rows"][-1]
    assert {"seed", "fp_top1", "top1", "nll", "ece", "flip_rate", "seconds", "peak_memory_mb", "weights_mb"} <= set(row)
    assert row["fp_top1"] == results["rows"][3]["top1"]
    assert "seconds" not in results["rows"][0]  # the given network was not trained
    assert results["protocol"]["calibration_images"] == results["protocol"]["train_images"] == 48
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2]
    assert sum(e["event"] == "pass" for e in events) == 12
    assert '"flat"' in (out / "config.toml").read_text()


def test_the_printed_lines(finished):
    out, printed = finished
    lines = printed.splitlines()
    assert "[" in lines[2]
    assert any(line.endswith("flat: fine-tuning under the measured errors of the quantizer") for line in lines)
    assert any("left] flat: w3a3 by rtn" in line for line in lines)
    assert lines[-2].startswith("At w")  # the result in one sentence
    assert lines[-2].endswith(".")
    assert lines[-1] == f"report: {out / 'report.html'}"


def test_an_arm_can_be_evaluated(finished, tiny, planish):
    out, _ = finished
    rows = {(r["arm"], r["scheme"]): r for r in json.loads((out / "results.json").read_text())["rows"]}
    for file, scheme, extra in (
        ("flat.safetensors", "fp32", tiny), ("flat-w3a3-rtn.safetensors", "w3a3", [*tiny[2:], "--trust"]),
    ):  # fmt: skip
        ended = planish("evaluate", out / file, *extra)
        assert ended.status == 0, ended.err
        row = rows["flat", scheme]
        assert f"top1       {row['top1']:.2%}" in ended.out
        assert f"nll        {row['nll']:.4f}" in ended.out
    assert planish("evaluate", *tiny, "--weights", out / "flat.safetensors").out.count(
        f"{rows['flat', 'fp32']['nll']:.4f}"
    )


def test_quantize_writes_what_evaluate_reads(tiny, planish, shared, tmp_path):
    from planish.data import load_data, make_loader
    from planish.deploy.checkpoint import load
    from planish.evaluation import evaluate

    ended = planish("quantize", *tiny, "--scheme", "w3a3", "--calibration-images", "24")
    assert ended.status == 0, ended.err
    assert "conv2.weight  conv2d    3     channel" in ended.out
    assert "fewer than" not in ended.out
    model = load(Path("quantized.safetensors"), trust=True)
    assert model.planish_protocol["calibration_images"] == 24
    data = load_data(shared / "data", model.planish_preprocessing)
    worth = evaluate(model, make_loader(data.test, 8, shuffle=False, seed=0))
    ended = planish("evaluate", "quantized.safetensors", *tiny[2:], "--trust")
    assert f"top1       {worth['top1']:.2%}\nnll        {worth['nll']:.4f}" in ended.out
    again = planish("quantize", *tiny)
    assert again.status == 2
    assert "already there" in again.err
    assert planish("quantize", *tiny, "--overwrite").status == 0


def test_quantize_on_a_folder_of_images_without_labels(tiny, planish, shared, tmp_path):
    from PIL import Image

    from planish.data import load_unlabelled, make_loader
    from planish.deploy.checkpoint import load
    from planish.models import load_model
    from planish.network import taps_of
    from planish.ptq import quantize

    model = tiny[:2]
    assert model[0] == "--model"
    folder = tmp_path / "any"
    for i, path in enumerate(sorted((shared / "data" / "class0").iterdir())[:5]):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.open(path).save(folder / f"{i % 2}" / f"{i}.png")
    ended = planish("quantize", *model, "--unlabelled", folder, "--scheme", "w4a4")
    assert ended.status == 0, ended.err
    assert "calibration on all 5 images without labels, which is fewer than the 512 asked for" in ended.out
    found = load(Path("quantized.safetensors"), trust=True)
    assert found.planish_protocol["calibration_images"] == 5
    assert found.planish_protocol["data"] == f"{folder}, without labels"
    assert getattr(found, "planish_classes", None) is None
    given = load_model(model[1], trust=True)
    images, _ = load_unlabelled(folder, given.preprocessing)
    expected = dict(taps_of(quantize(given.model, make_loader(images, 5, shuffle=False, seed=0), "w4a4")))
    assert all(torch.equal(tap.scale, expected[name].scale) for name, tap in taps_of(found))
    ended = planish("quantize", *tiny, "--unlabelled", folder, "--out", "b.safetensors")
    assert ended.status == 2
    assert f"--unlabelled {folder}: calibration reads one of them" in " ".join(ended.err.split())
    (tmp_path / "m.py").write_text(
        "from torch import nn\nLOOKS = {'input_size': [1, 16, 16], 'mean': [0.5], 'std': [0.25], 'crop_pct': 1.0}\n"
        "def tokens():\n    model = nn.Sequential(nn.Conv2d(1, 3, 3))\n    model.planish_preprocessing = LOOKS\n"
        "    return model\ndef wide():\n    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))\n"
        "    model.planish_preprocessing = LOOKS\n    return model\n"
    )
    for name, words in (("tokens", "output has shape (1, 3, 14, 14)"), ("wide", "cannot take images of shape (1, 16,")):
        ended = planish("quantize", f"{tmp_path / 'm.py'}:{name}", "--unlabelled", folder, "--out", "b.safetensors")
        assert ended.status == 2
        assert words in " ".join(ended.err.split())
    ended = planish("quantize", *model, "--unlabelled", tmp_path / "nowhere", "--out", "b.safetensors")
    assert ended.status == 2
    assert "nowhere does not exist" in " ".join(ended.err.split())


def test_quantize_within_a_budget(tiny, planish):
    from planish.cli.quantize import _spent
    from planish.deploy.checkpoint import load
    from planish.network import ledger, weights_megabytes
    from planish.ptq.budget import Budget

    ended = planish("quantize", *tiny, "--scheme", "w3a4", "--budget", "0.9kB")
    assert ended.status == 0, ended.err
    assert re.search(r"assign-bits: agrees with the float network on 100\.0 %", ended.out)
    model = load(Path("quantized.safetensors"), trust=True)
    assert model.planish_protocol["budget"] == "0.9kB"
    size = weights_megabytes(model)
    assert 0.0007 < size <= 0.0009
    assert f"of a budget of 900 B: {1e6 * size:.4g} B, " in ended.out
    assert f"quantized.safetensors: {' and '.join(ledger(model).shares)} by rtn; " in ended.out
    bits = [site.bits for site in ledger(model).rows if site.site.endswith("weight")]
    assert len(set(bits)) > 1
    for line in (f"conv2.weight  conv2d    {bits[1]}     channel", f"head.weight   linear    {bits[2]}     channel"):
        assert line in ended.out
    assert "over the budget" not in ended.out
    for budget, over in (("700B", True), ("1kbops", True), ("1Gbops", False), ("0.01x", True), ("1x", False)):
        assert ("; over the budget" in _spent(Budget.parse(budget), model, model)) is over
    both = planish("quantize", *tiny, "--budget", "0.6Mbops", "--budget-activations", "--overwrite")
    assert both.status == 0, both.err
    rows = ledger(load(Path("quantized.safetensors"), trust=True)).rows
    assert len({row.bits for row in rows if row.site.endswith("input")}) > 1
    assert planish("quantize", *tiny, "--budget-activations", "--overwrite").err.count("give --budget, such as") == 1
    for budget, match in (("20B", "too little"), ("plenty", "budget 'plenty' is not understood")):
        refused = planish("quantize", *tiny, "--budget", budget, "--overwrite")
        assert refused.status == 2
        assert match in refused.err


def test_flatten_writes_weights_of_the_same_architecture(tiny, planish):
    ended = planish("flatten", *tiny, "--epochs", "1", "--scheme", "w3a3", "--out", "f.safetensors")
    assert ended.status == 0, ended.err
    assert "use it with --weights f.safetensors" in ended.out
    assert sorted(p.name for p in Path().iterdir()) == ["f.jsonl", "f.safetensors"]
    assert "conv1.weight" in read_weights("f.safetensors")[0]
    assert (
        planish(
            "run", *tiny, "--weights", "f.safetensors", "--arms", "given", "--methods", "rtn", "--schemes", "w4a4"
        ).status
        == 0
    )
    assert [p.name[:5] for p in Path("runs").iterdir()] == ["tiny-"]


def test_the_model_may_be_named_without_an_option(tiny, planish):
    bare = [tiny[1], *tiny[2:]]
    assert planish("quantize", *bare, "--out", "a.safetensors").status == 0
    assert planish("quantize", *tiny, "--out", "b.safetensors").status == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert planish("flatten", *bare, "--epochs", "1", "--out", "f.safetensors").status == 0
    for command in ("quantize", "flatten"):
        ended = planish(command, *tiny, "convnet", "--out", "c.safetensors")
        assert ended.status == 2
        assert "two models are named, convnet and --model" in ended.err


def test_a_quantized_network_is_compared_with_weights_of_its_own(tiny, planish):
    assert planish("flatten", *tiny, "--epochs", "1", "--out", "f.safetensors").status == 0
    assert (
        planish("quantize", *tiny, "--weights", "f.safetensors", "--scheme", "w8a8", "--out", "q.safetensors").status
        == 0
    )
    rest = [*tiny[2:], "--trust"]
    ended = planish("evaluate", "q.safetensors", *rest, "--against", tiny[1], "--weights", "f.safetensors")
    assert ended.status == 0, ended.err
    assert f"(against {tiny[1]})" in ended.out
    alone = planish("evaluate", "q.safetensors", *rest, "--weights", "f.safetensors")
    assert alone.status == 2
    assert "with --against MODEL, --weights are those of the network to compare with" in alone.err


def test_a_model_of_ones_own_that_does_not_say_what_it_takes(tiny, planish):
    ended = planish("quantize", "--model", tiny[1].replace(":build", ":bare"), *tiny[2:])
    assert ended.status == 2
    assert "cannot take images of shape (3, 224, 224), as they are prepared for it from data" in ended.err
    assert "in its attribute planish_preprocessing (docs/models.md)" in ended.err
    ended = planish("quantize", "--model", tiny[1].replace(":build", ":four"), *tiny[2:])
    assert "give a model that was trained for 3 classes (--model, --weights)" in ended.err


def test_what_an_option_does_not_change_is_said(tiny, planish):
    ended = planish("quantize", *tiny, "--iterations", "5", "--out", "a.safetensors")
    assert "note: rtn learns nothing, so --iterations changes nothing" in ended.out
    plain = ["--model", f"{tiny[1].partition(':')[0]}:plain", *tiny[2:]]
    for network, noted in ((tiny, False), (plain, True)):
        ended = planish(
            "flatten", *network, "--epochs", "1", "--batch-statistics", "--out", "f.safetensors", "--overwrite"
        )
        assert ended.status == 0, ended.err
        assert ("has no BatchNorm, so --batch-statistics changes nothing" in ended.out) == noted
    assert "are for planish train)" in planish("quantize", *tiny, "--method", "kd", "--out", "b.safetensors").err


@pytest.mark.slow
def test_the_embedded_network_counts_flips(planish, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert planish("quantize", "--model", "convnet", "--threads", "1").status == 0
    ended = planish("evaluate", "quantized.safetensors", "--threads", "1")
    assert "(against convnet as it was given)" in ended.out
    assert "images     2000" in ended.out


def test_quantize_by_reconstruction_says_what_it_will_cost(tiny, planish):
    options = ["--method", "qdrop", "--iterations", "3", "--memory", "0.5", "--calibration-images", "24"]
    ended = planish("quantize", *tiny, "--scheme", "w2a4", *options)
    assert ended.status == 0, ended.err
    assert re.search(r"reconstruct: \d+ units, about \d+ s, \d+ MB of caches\n", ended.out)
    assert "reconstruct: agrees with the float network on" in ended.out
    for wrong, words in (
        ("--iterations", "iterations is 0"), ("--memory", "memory is 0"), ("--precision", "precision is '0'"),
    ):  # fmt: skip
        ended = planish("quantize", *tiny, "--overwrite", wrong, "0")
        assert ended.status == 2
        assert words in ended.err


def test_a_method_is_printed_as_its_passes(planish):
    ended = planish("methods", "genie")
    assert ended.status == 0
    assert re.search(r"^genie: .*; its passes:$", ended.out, re.MULTILINE)
    assert re.search(r"^  reconstruct +.*iterations=\d+.*learner='genie', loss='local'", ended.out, re.MULTILINE)


def test_methods_are_grouped_lines(planish):
    ended = planish("methods")
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert lines[0] == "quantization methods (--methods, --method)"
    assert [line for line in lines if line.split()[:1] == ["rtn"] and "[Jacob et al. 2018" in line]
    assert [line for line in lines if line.split()[:1] == ["differential-forward"]]
    assert not [line for line in lines if line and not line.startswith(" ") and "(--" not in line]


def test_no_line_is_wrapped_where_there_is_no_terminal(finished):
    _, printed = finished
    assert "fewer than the 512 asked for\n" in printed
    assert max(len(line) for line in printed.splitlines()) > 80


HEAVY = "torch", "timm", "numpy", "accelerate", "torchvision", "matplotlib"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["quantize", "--help"], []])
def test_help_answers_at_once(arguments):
    program = (
        "import sys, time\nbegan = time.process_time()\nfrom planish.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], time.process_time() - began < 0.9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] True"
    assert "planish" in done.stdout


def test_options_that_are_not_given_come_from_the_interrupted_run(tiny, planish, monkeypatch):
    import planish.recipes.journey as journey

    def stop(*_, **__):
        raise KeyboardInterrupt

    command = ["run", *tiny, "--arms", "given", "--methods", "rtn", "--schemes", "w4a4,w3a3", "--seed", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(journey, "write_report", stop)
        ended = planish(*command)
    assert ended.status == 130
    assert "planish run --resume --out runs/tiny-" in ended.err
    other = planish("run", "--resume", "--seed", "4", "--trust")
    assert other.status == 2
    assert "seed was 3, is 4" in other.err
    ended = planish("run", "--resume", "--trust")
    assert ended.status == 0, ended.err
    rows = json.loads(next(Path("runs").glob("tiny-*/results.json")).read_text())["rows"]
    assert [(row["scheme"], row["seed"]) for row in rows] == [("fp32", 3), ("w4a4", 3), ("w3a3", 3)]


def test_estimate_of_the_remaining_time(monkeypatch):
    from rich.console import Console

    import planish.recipes.work as work_module

    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    plan = [("test", 1.0), ("train", 10.0), ("test", 1.0), ("train", 10.0), ("test", 1.0)]
    work = work_module.Work(plan, Console(quiet=True))
    assert work.left() is None
    work.begin("test")
    now = 2.0
    work.end()
    assert work.left() == pytest.approx(2.0 * 22)  # only one unit of cost is known to take 2 s
    work.begin("train")
    now = 7.0
    work.at(0.5)
    assert work.left() == pytest.approx(5 + 2 + 10 + 2)  # half of the training took 5 s
    now = 12.0
    work.end()
    work.begin("test")
    work.end(measured=False)
    assert work.left() == pytest.approx(10 + 2)
    assert [work_module.duration(s) for s in (3.2, 89, 600, 9000)] == ["3 s", "89 s", "10 min", "2.5 h"]


def test_the_seed_of_torch_is_not_needed(tiny, planish):
    """What the process drew before does not change a result."""
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        assert (
            planish(
                "run", *tiny, "--arms", "flat", "--methods", "rtn", "--schemes", "w4a4", "--epochs", "1", "--out", name
            ).status
            == 0
        )
    assert Path("a/flat.safetensors").read_bytes() == Path("b/flat.safetensors").read_bytes()


def test_a_run_says_what_its_flat_network_learned_from(tiny, planish):
    run = ["run", *tiny, "--arms", "flat", "--schemes", "w4a4", "--methods", "rtn", "--epochs", "1"]
    assert planish(*run, "--out", "usual").status == 0
    assert planish(*run, "--labels", "0", "--distillation", "1", "--batch-statistics", "--out", "other").status == 0
    usual, other = (json.loads(Path(name, "results.json").read_text())["protocol"] for name in ("usual", "other"))
    assert usual["labels_used"] == usual["train_images"] == other["train_images"]
    assert not {"flat_labels", "flat_batch_statistics"} & set(usual)
    assert (other["labels_used"], other["flat_labels"], other["flat_batch_statistics"]) == (0, 0.0, True)
    assert "flat_batch_statistics" in planish("compare", "usual", "other", "--out", "both.html").out.replace(" ", "_")
