"""One picture, several models: the answers of each, the sentence, and figures in words."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from planish.deploy.classify import Classifier
from planish.deploy.comparison import BadPicture, check_classes, compare, milliseconds_text, names, outcome, size_text
from planish.errors import PlanishError
from tests.deploy.tiny_onnx import save_tiny, tiny_card, weights


def png(value=255):
    file = io.BytesIO()
    Image.new("L", (9, 9), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pair(tmp_path):
    low = save_tiny(tmp_path / "low.onnx", weight=-weights(tiny_card()))
    return [Classifier(save_tiny(tmp_path / "f.onnx", tiny_card(scheme="float"))), Classifier(low)]


def test_each_model_answers_as_it_does_alone(pair):
    found = compare(pair, png())
    assert found["outcome"] == "They differ: float says light, w4a4 says dark."
    for classifier, model in zip(pair, found["models"], strict=True):
        (alone,) = classifier.classify([io.BytesIO(png())])
        assert [(entry["label"], entry["probability"]) for entry in model["top"]] == alone.top(5)
        assert model["milliseconds"] > 0
        assert model["time"] == milliseconds_text(model["milliseconds"])


def test_agreement_and_one_model(pair):
    assert compare([pair[0], pair[0]], png())["outcome"] == "Both say light."
    assert compare(pair[:1], png(0))["outcome"] == "float says dark."


def test_models_of_one_scheme_are_called_by_their_files(pair):
    (answer,) = pair[0].classify([io.BytesIO(png())])
    assert names(pair) == ["float", "w4a4"]
    assert names([pair[1], pair[1]]) == ["low.onnx", "low.onnx"]
    assert outcome(["a.onnx", "b.onnx"], [answer, answer]) == "Both say light."


def test_models_take_turns_and_the_median_is_told(pair, monkeypatch):
    seen = []
    times = iter([(9, 8), (1, 2), (2, 4), (3, 6), (90, 80)])

    def run(self, pixels, real=Classifier.run):
        if not seen or len(seen) % 2 == 0:
            run.now = next(times)
        seen.append(self.path.name)
        return real(self, pixels)[0], run.now[(len(seen) - 1) % 2]

    monkeypatch.setattr(Classifier, "run", run)
    assert [model["milliseconds"] for model in compare(pair, png())["models"]] == [3, 6]
    assert seen == ["f.onnx", "low.onnx"] * 5


@pytest.mark.parametrize("content", [b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png()[:50]])
def test_what_is_no_picture(pair, content):
    with pytest.raises(BadPicture, match="the file"):
        compare(pair, content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_every_format_that_is_taken(pair, kind):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(file, kind)
    assert compare(pair[:1], file.getvalue())["outcome"] == "float says light."


def test_a_format_that_the_page_does_not_take(pair):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PCX")
    with pytest.raises(BadPicture, match="not an image"):
        compare(pair, file.getvalue())


def test_other_classes_cannot_be_compared(pair, tmp_path):
    other = Classifier(save_tiny(tmp_path / "o.onnx", tiny_card(classes=("a", "b", "c"))))
    check_classes(pair)
    with pytest.raises(PlanishError, match=r"f\.onnx and .*o\.onnx have other classes \(3 and 3 of them\)"):
        check_classes([*pair, other])


def test_figures_in_words():
    assert [milliseconds_text(x) for x in (0.0342, 3.414, 34.14, 341.4)] == ["0.034 ms", "3.41 ms", "34.1 ms", "341 ms"]
    assert [size_text(x) for x in (1_380, 450_300, 999_600, 2_360_000, 10_000_000, 345_600_000, 2_000_000_000)] == [
        "1.38 kB", "450 kB", "1 MB", "2.36 MB", "10 MB", "346 MB", "2000 MB",
    ]  # fmt: skip
