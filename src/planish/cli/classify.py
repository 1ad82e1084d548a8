"""``planish classify``. Without PyTorch, so that it starts at once where only ONNX Runtime is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from planish.cli.options import Classify
from planish.deploy.classify import Answer, Classifier
from planish.errors import PlanishError, printable
from planish.images import list_images


def execute(command: Classify) -> int:
    """Print a line for each image; returns 1 if one of them could not be read, else 0."""
    if not command.images:
        raise PlanishError("no image is given: name image files, or folders of them")
    if command.top < 1:
        raise PlanishError(f"--top is {command.top}: give 1 or more")
    if command.threads < 1:
        raise PlanishError(f"--threads is {command.threads}: give 1 or more")
    classifier = Classifier(command.model, command.threads)
    total = failed = 0
    for image in _files(command.images):
        total += 1
        try:
            if isinstance(image, PlanishError):
                raise image
            pixels = classifier.read(image)
        except PlanishError as error:
            failed += 1
            print(f"planish: {printable(str(error))}", file=sys.stderr, flush=True)
            continue
        answer = classifier.answer(classifier.run(pixels))
        print(_json(image, answer, command.top) if command.json else _line(image, answer, command.top))
    if failed:
        sys.stdout.flush()
        print(f"planish: {failed} of {total} images could not be classified", file=sys.stderr)
    return int(failed > 0)


def _files(images: tuple[Path, ...]) -> Iterator[Path | PlanishError]:
    """The files named, and the images below the folders named; an empty folder gives what is wrong with it."""
    for image in images:
        if not image.is_dir():
            yield image
            continue
        found, other = list_images(image)
        yield from found
        if not found:
            yield PlanishError(f"the folder {image} holds no image file ({other} other files)")


def _line(image: Path, answer: Answer, top: int) -> str:
    named = "; ".join(f"{label} {100 * probability:.2f} %" for label, probability in answer.top(top))
    return printable(f"{image}: {named}")


def _json(image: Path, answer: Answer, top: int) -> str:
    answers = [{"label": label, "probability": probability} for label, probability in answer.top(top)]
    return json.dumps({"image": str(image), "answers": answers, "milliseconds": round(answer.milliseconds, 4)})
