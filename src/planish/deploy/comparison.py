"""What one or several exported models say about one picture, and how long each takes."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from planish.deploy.classify import Answer, Classifier
from planish.errors import PlanishError

ROUNDS = 5  # of which the median is told
TOP = 5


class BadPicture(PlanishError):
    """What was sent is no picture that can be read."""


def check_classes(classifiers: Sequence[Classifier]) -> None:
    """Raise PlanishError unless all models have the same classes in the same order."""
    first = classifiers[0]
    for other in classifiers[1:]:
        if other.card.classes != first.card.classes:
            raise PlanishError(
                f"{first.path} and {other.path} have other classes ({len(first.card.classes)} and "
                f"{len(other.card.classes)} of them), so their answers cannot be compared"
            )


def names(classifiers: Sequence[Classifier]) -> list[str]:
    """What each model is called beside the others: its scheme, or its file where two have the same scheme."""
    schemes = [classifier.card.scheme for classifier in classifiers]
    return schemes if len(set(schemes)) == len(schemes) else [classifier.path.name for classifier in classifiers]


def compare(classifiers: Sequence[Classifier], data: bytes) -> dict[str, Any]:
    """Ask each model about one picture, in turns, so that both meet the same machine.

    Returns:
        ``outcome``, one sentence; ``models``, for each the ``milliseconds`` of the network alone (median of 5), the
        same as the text ``time``, and the most probable labels as ``top``.

    Raises:
        BadPicture: ``data`` is no picture that can be read.
        PlanishError: a model fails.
    """
    try:
        inputs = [classifier.read(io.BytesIO(data)) for classifier in classifiers]
    except PlanishError as error:
        raise BadPicture(str(error)) from error
    times: list[list[float]] = [[] for _ in classifiers]
    answers: list[Answer] = []
    for _ in range(ROUNDS):
        answers = [classifier.answer(classifier.run(x)) for classifier, x in zip(classifiers, inputs, strict=True)]
        for taken, answer in zip(times, answers, strict=True):
            taken.append(answer.milliseconds)
    medians = [statistics.median(taken) for taken in times]
    models = [
        {
            "milliseconds": milliseconds,
            "time": milliseconds_text(milliseconds),
            "top": [{"label": label, "probability": share} for label, share in answer.top(TOP)],
        }
        for answer, milliseconds in zip(answers, medians, strict=True)
    ]
    return {"outcome": outcome(names(classifiers), answers), "models": models}


def outcome(called: Sequence[str], answers: Sequence[Answer]) -> str:
    """Whether the models agree on the label, in one sentence."""
    named = [answer.labels[0] for answer in answers]
    if len(named) == 1:
        return f"{called[0]} says {named[0]}."
    if len(set(named)) == 1:
        return f"Both say {named[0]}."
    said = ", ".join(f"{name} says {label}" for name, label in zip(called, named, strict=True))
    return f"They differ: {said}."


def milliseconds_text(value: float) -> str:
    """``0.034 ms``, ``3.41 ms``, ``341 ms``: three digits."""
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f} ms"


def size_text(count: int) -> str:
    """``450 kB``, ``2.36 MB``, ``345 MB``: powers of ten, three digits."""
    megabytes = count / 1e6
    if megabytes < 0.9995:
        return f"{1000 * megabytes:.3g} kB"
    return f"{megabytes:.3g} MB" if megabytes < 999.5 else f"{megabytes:.0f} MB"
