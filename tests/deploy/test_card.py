"""The card survives the file, and a card that is not one is refused in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from planish.deploy.card import KEY, read_card
from planish.errors import PlanishError
from planish.preprocessing import Preprocessing
from tests.deploy.tiny_onnx import tiny_card, tiny_model


def values() -> dict:
    return json.loads(tiny_card().to_metadata()[KEY])


def test_round_trip_through_a_model_and_through_a_mapping():
    card = tiny_card(classes=("Ångström", "crane", "crane"), preprocessing=Preprocessing(crop_mode="border"))
    assert read_card(tiny_model(card)) == card == read_card({**card.to_metadata(), "other": "x"})


def test_the_contract_of_the_metadata():
    assert values() == {
        "format": 1, "planish": "0.1.0", "name": "tiny", "scheme": "w4a4", "classes": ["dark", "light", "neither"],
        "preprocessing": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "interpolation": "bilinear",
                          "crop_pct": 1.0, "crop_mode": "center"},
        "protocol": {"calibration_images": 8},
    }  # fmt: skip


def test_importing_needs_no_torch_and_no_onnx():
    program = (
        "import sys, planish.deploy, planish.deploy.card\n"
        "print([name for name in ('torch', 'timm', 'onnx', 'onnxruntime', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "not exported by planish"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": NaN}', "NaN"),
        ("[1]", "a JSON list"),
        ("{}", "lacks 'format'"),
        ('{"format": 1}', "lacks 'planish'"),
        ('{"format": 2}', "format 2, this planish reads 1"),
        ('{"format": true}', "format True"),
    ],
)
def test_a_text_that_is_no_card(text, words):
    with pytest.raises(PlanishError, match=words) as caught:
        read_card({} if text is None else {KEY: text})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("name", 3, "name is 3"),
        ("name", "", "name is ''"),
        ("scheme", None, "scheme is None"),
        ("planish", [], "planish is"),
        ("classes", "abc", "classes is 'abc'"),
        ("classes", [], "classes is"),
        ("classes", ["a", 1], "classes is"),
        ("protocol", [1], r"protocol is \[1\]"),
        ("preprocessing", [], "preprocessing is"),
        ("preprocessing", {}, "lacks 'input_size'"),
        ("extra", 1, "unknown entry 'extra'"),
    ],
)
def test_a_field_of_another_kind(key, value, words):
    with pytest.raises(PlanishError, match=words):
        read_card({KEY: json.dumps(values() | {key: value})})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("input_size", [1, 8], "input_size"),
        ("input_size", [1, 8, 8.5], "whole numbers"),
        ("input_size", [1, True, 8], "whole numbers"),
        ("input_size", 8, "whole numbers"),
        ("input_size", [1, 10**8, 8], "at most 8192 pixels"),
        ("mean", ["a"], "list of numbers"),
        ("mean", [10**400], "list of numbers"),
        ("mean", [0.5, 0.5], "as many values"),
        ("mean", [], "as many values"),
        ("std", [0.0], "above 0"),
        ("std", [None], "list of numbers"),
        ("crop_pct", "1", "a number"),
        ("crop_pct", 1e-9, "at least 0.01"),
        ("interpolation", 2, "a name"),
        ("crop_mode", [], "a name"),
        ("size", 3, "unknown entry 'size'"),
    ],
)
def test_preprocessing_that_is_none(key, value, words):
    bad = values()
    bad["preprocessing"][key] = value
    with pytest.raises(PlanishError, match=words) as caught:
        read_card({KEY: json.dumps(bad)})
    assert "\n" not in str(caught.value)


def test_each_field_is_needed():
    for key in values():
        with pytest.raises(PlanishError, match=f"lacks '{key}'"):
            read_card({KEY: json.dumps({k: v for k, v in values().items() if k != key})})


def test_a_protocol_that_json_cannot_hold():
    for value in (float("nan"), object()):
        with pytest.raises(PlanishError, match="cannot be written as JSON"):
            tiny_card(protocol={"top1": value}).to_metadata()
