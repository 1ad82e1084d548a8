"""`planish classify`: a line an image, and images that fail do not stop the others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from planish.cli.classify import printable
from tests.deploy.tiny_onnx import save_tiny, tiny_card


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for name, value in (("photos/b.png", 255), ("photos/deeper/c.jpg", 0), ("a.png", 200)):
        Image.fromarray(np.full((9, 12), value, np.uint8)).save(tmp_path / name)
    (tmp_path / "photos" / "notes.txt").write_text("x")
    return save_tiny(tmp_path / "m.onnx").name


def test_lines_in_the_order_given_with_folders_opened(planish, model):
    ended = planish("classify", model, "a.png", "photos")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["a.png", "photos/b.png", "photos/deeper/c.jpg"]
    assert lines[1] == "photos/b.png: light 86.68 %; neither 11.73 %; dark 1.59 %"
    assert lines[2].startswith("photos/deeper/c.jpg: dark ")


def test_json_lines_and_top(planish, model):
    ended = planish("classify", model, "photos", "--json", "--top", "2", "--threads", "2")
    first, second = map(json.loads, ended.out.splitlines())
    assert first["image"] == "photos/b.png"
    assert [answer["label"] for answer in first["answers"]] == ["light", "neither"]
    assert first["answers"][0]["probability"] == pytest.approx(0.8668, abs=1e-4)
    assert first["milliseconds"] > 0
    assert [answer["label"] for answer in second["answers"]] == ["dark", "neither"]


def test_failures_are_named_and_counted_and_the_others_go_on(planish, model, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    ended = planish("classify", model, "text.png", "a.png", "gone.png", "empty", "photos/b.png")
    assert ended.status == 1
    assert [line.split(":")[0] for line in ended.out.splitlines()] == ["a.png", "photos/b.png"]
    assert ended.err.splitlines() == [
        "planish: text.png is not an image that can be read",
        "planish: gone.png does not exist",
        "planish: the folder empty holds no image file (0 other files)",
        "planish: 3 of 5 images could not be classified",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no image is given"),
        (["a.png", "--top", "0"], "--top is 0"),
        (["a.png", "--threads", "0"], "--threads is 0"),
    ],
)
def test_arguments_that_make_no_sense(planish, model, arguments, words):
    ended = planish("classify", model, *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err
    assert ended.err.count("\n") == 1


def test_what_is_no_model(planish, model):
    for name, words in (("gone.onnx", "does not exist"), ("a.png", "not an ONNX model")):
        ended = planish("classify", name, "a.png")
        assert (ended.status, ended.out) == (2, "")
        assert words in ended.err
        assert ended.err.count("\n") == 1


def test_labels_cannot_command_the_terminal(planish, model, tmp_path):
    save_tiny(tmp_path / "evil.onnx", tiny_card(classes=("a", "\x1b[31mred\n", "ß\u202e")))
    ended = planish("classify", "evil.onnx", "photos/b.png")
    assert "\x1b" not in ended.out
    assert r"\x1b[31mred\n 86.68 %" in ended.out
    assert r"ß\u202e" in ended.out
    assert printable("plain ü 日本 \x07") == "plain ü 日本 \\x07"
