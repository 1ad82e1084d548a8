"""Classify images with an exported model: ONNX Runtime, Pillow and numpy, no PyTorch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from planish.deploy.card import INPUT, OUTPUT, Card, read_card
from planish.deploy.pixels import INTERPOLATIONS, to_input
from planish.errors import PlanishError
from planish.images import decode

_QUIET = 4  # ONNX Runtime's severity "fatal": what it says otherwise is in the exception too


@dataclass(frozen=True)
class Answer:
    """What a model says about one image: every label, the most probable first.

    Attributes:
        labels: the classes.
        probabilities: in the order of ``labels``; their sum is 1, but where each label is true or not by itself.
        milliseconds: that the network took, without decoding and resizing.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    milliseconds: float

    def top(self, count: int) -> list[tuple[str, float]]:
        """The ``count`` most probable labels with their probabilities (all, if there are fewer)."""
        return list(zip(self.labels[:count], self.probabilities[:count], strict=True))


class Classifier:
    """An exported model, ready to be asked. One image at a time goes through it, so no image depends on another.

    Attributes:
        card: what is known of the model.
        path: the file.
        size: the bytes of the file.

    Args:
        path: an ONNX file that ``planish export`` wrote.
        threads: of ONNX Runtime.

    Raises:
        PlanishError: ONNX Runtime is not installed, or the file is missing, no ONNX model, not exported by planish, or
            other than its card says.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path = Path(path).expanduser()
        if threads < 1:
            raise PlanishError(f"threads is {threads}: give 1 or more")
        self._session = _open(self.path, threads)
        try:
            self.card: Card = read_card(self._session.get_modelmeta().custom_metadata_map)
            if self.card.task == "features":
                raise PlanishError("the model gives features and no classes, so there is nothing to name")
            _check_signature(self._session, self.card)
        except PlanishError as error:
            raise PlanishError(f"{self.path}: {error}") from error
        self.size = self.path.stat().st_size

    def classify(self, images: Iterable[str | Path | BinaryIO | Image.Image]) -> list[Answer]:
        """Ask the model about each image: a file, an open binary file, or a Pillow image in mode "L" or "RGB".

        Raises:
            PlanishError: an image cannot be read or is too large, or the model fails on it; the message names the file.
        """
        return [self.answer(self.run(self.read(image))) for image in images]

    def read(self, image: str | Path | BinaryIO | Image.Image) -> np.ndarray:
        """One image as the model's input: float32, shape (channels, height, width).

        Raises:
            PlanishError: the image cannot be read or is too large.
        """
        preprocessing = self.card.preprocessing
        mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        if isinstance(image, Image.Image):
            return to_input(image.convert(mode), preprocessing)
        source = Path(image) if isinstance(image, str) else image
        what = str(source) if isinstance(source, Path) else "the file"
        if isinstance(source, Path) and not source.is_file():
            raise PlanishError(f"{what} {'is no file' if source.exists() else 'does not exist'}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about metadata and sizes: what matters is found by decoding
                return to_input(decode(source, preprocessing.input_size[0]), preprocessing)
        except Exception as error:  # decoders raise a zoo: OSError, SyntaxError, struct.error, EOFError, ...
            raise PlanishError(f"{what} {_why(error)}") from error

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, float]:
        """The logits, shape (classes,), of one input (channels, height, width), and the milliseconds they took.

        Raises:
            PlanishError: the model fails, or gives something other than one finite logit a class.
        """
        began = time.perf_counter()
        try:
            (logits,) = self._session.run([OUTPUT], {INPUT: pixels[None]})
        except Exception as error:  # ONNX Runtime's own classes, which have no public base
            raise PlanishError(f"{self.path}: the model fails: {_first_line(error)}") from error
        milliseconds = 1000 * (time.perf_counter() - began)
        if logits.shape != (1, len(self.card.classes)) or not np.isfinite(logits).all():
            raise PlanishError(
                f"{self.path}: the model gave an output of shape {logits.shape} or one that is not finite, "
                f"expected a finite logit for each of {len(self.card.classes)} classes"
            )
        return logits[0], milliseconds

    def answer(self, result: tuple[np.ndarray, float]) -> Answer:
        """What :meth:`run` gave, as labels and probabilities."""
        logits, milliseconds = result
        order = np.argsort(-logits, kind="stable")
        if self.card.task == "labels":
            probabilities = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -500, 500)))
        else:
            powers = np.exp((logits - logits.max()).astype(np.float64))
            probabilities = powers / powers.sum()
        labels = tuple(self.card.classes[i] for i in order)
        return Answer(labels, tuple(probabilities[order].tolist()), milliseconds)


def _open(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise PlanishError("this needs ONNX Runtime, which is not installed: pip install planish[onnx]") from error
    if not path.is_file():
        raise PlanishError(f"the model {path} {'is no file' if path.exists() else 'does not exist'}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _QUIET
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes, which have no public base
        raise PlanishError(f"{path} is not an ONNX model that ONNX Runtime can run: {_first_line(error)}") from error


def _check_signature(session: Any, card: Card) -> None:
    """Raise PlanishError unless the graph takes and gives what the card says; a symbolic side fits any number."""
    if card.preprocessing.interpolation not in INTERPOLATIONS:
        raise PlanishError(
            f"the card asks for the interpolation {card.preprocessing.interpolation!r:.60}, "
            f"expected one of {', '.join(INTERPOLATIONS)}"
        )
    for what, found, name, sides in (
        ("input", session.get_inputs(), INPUT, card.preprocessing.input_size),
        ("output", session.get_outputs(), OUTPUT, (len(card.classes),)),
    ):
        expected = f"one float32 {what} {name!r} (batch, {', '.join(map(str, sides))})"
        shape = list(found[0].shape) if len(found) == 1 else []
        sound = len(found) == 1 and (found[0].name, found[0].type) == (name, "tensor(float)")
        fits = len(shape) == 1 + len(sides) and all(
            not isinstance(side, int) or side == wanted for side, wanted in zip(shape[1:], sides, strict=True)
        )
        if not (sound and fits and (shape[0] == 1 or not isinstance(shape[0], int))):
            given = "; ".join(f"{node.name!r} {node.type} {node.shape}" for node in found)
            raise PlanishError(f"the card promises {expected}, but the model has {given:.200}")


def _why(error: Exception) -> str:
    """Why an image could not be used, in the words after its name."""
    if isinstance(error, (PlanishError, Image.DecompressionBombError)):
        return f"is too large: {_first_line(error)}"
    if isinstance(error, MemoryError):
        return "does not fit in the memory"
    reason = _first_line(error).split(" <")[0]
    if "cannot identify image file" in reason:
        return "is not an image that can be read"
    return f"cannot be read: {reason}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
