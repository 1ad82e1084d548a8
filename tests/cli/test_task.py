"""``--task``: networks whose outputs are labels or features, on image folders."""

from __future__ import annotations

from tests.cli.test_data import given


def values(text: str) -> dict[str, str]:
    """The first words of the lines: what was measured, and its value."""
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 1}


def test_features_keep_their_task_in_the_file(tiny, shared, tmp_path, planish):
    made = planish("quantize", *tiny, "--scheme", "w4a4", "--task", "features", "--out", "q.safetensors")
    assert made.status == 0, made.err
    model = tiny[tiny.index("--model") + 1]
    measured = planish(
        "evaluate", "q.safetensors", "--trust", "--data", str(shared / "data"), "--against", model
    )  # fmt: skip
    assert measured.status == 0, measured.err
    found = values(measured.out)
    assert 0.5 < float(found["cosine"]) <= 1
    assert float(found["error"]) > 0
    assert found["knn_top1"].endswith("%")
    assert "top1" not in found
    exported = planish("export", "q.safetensors", "--trust", "--data", str(shared / "data"), "--no-timing")
    assert exported.status == 0, exported.err
    assert "same direction as the PyTorch model" in exported.out


def test_labels_and_unknown_tasks(tiny, planish):
    ended = planish("evaluate", *tiny, "--task", "labels")
    assert ended.status == 0, ended.err
    assert {"map", "ap_micro", "f1", "exact"} <= values(ended.out).keys()
    for command in ("evaluate", "quantize"):
        ended = planish(command, *tiny, "--task", "boxes")
        assert ended.status == 2
        assert "choose one of classes, labels, features" in " ".join(ended.err.split())


def test_an_embedded_network_loses_its_head(shared, planish, tiny):
    options = given(["--model", "convnet", "--data", ""], shared / "data")
    ended = planish("evaluate", *options, "--task", "features")
    assert ended.status == 0, ended.err
    assert "training images vote by their features" in ended.out
    assert "knn_top1" in ended.out
