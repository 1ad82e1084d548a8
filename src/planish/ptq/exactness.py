"""For passes that must not change what the network computes: the test that they do not, and when they may run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import map_tensors
from planish.network.taps import taps_of
from planish.ptq.passes import Calibration, run_logits

T = TypeVar("T")

TOLERANCE = 1e-6  # largest change of a logit in float64, relative to the largest magnitude
IMAGES = 4  # a change that is not exact shows on the first


class NotChecked(PlanishError):
    """Nothing can be said of any change: the network as it is does not run in float64."""


@torch.no_grad()
def check_exact(model: nn.Module, change: Callable[[nn.Module, Any], None], batch: Any, what: str) -> None:
    """Do ``change(model, images)`` to a copy in float64 and compare the logits of a few images; the model is untouched.

    Float64 tells rounding, in whatever precision the network runs, from what is not the same function.

    Args:
        what: the subject of the sentence if it is not ("turning the values").

    Raises:
        PlanishError: the logits change, or the network does not run in float64, or no longer runs.
    """
    try:
        images = map_tensors(few_images(batch), lambda t: t.double() if t.is_floating_point() else t)
        before = copy.deepcopy(model).double()
        (then,) = run_logits(before, [images])
    except Exception as error:
        raise NotChecked(f"{what} cannot be checked, because the network does not run in float64: {error}") from None
    after = copy.deepcopy(before)
    change(after, images)
    try:
        (now,) = run_logits(after, [images])
    except Exception as error:  # whatever the code of a model raises
        raise PlanishError(f"{what} leaves a network that does not run, so it is left out: {error}") from None
    difference = relative_change(now, then)
    if not difference <= TOLERANCE:
        raise PlanishError(f"{what} changes the outputs by {difference:.1g} of the largest logit, so it is left out")


def exact_ones(
    model: nn.Module, changes: Mapping[str, T], make: Callable[[nn.Module, dict[str, T]], None], batch: Any, what: str
) -> tuple[dict[str, T], list[str]]:
    """Those of some changes that leave the outputs what they are, by :func:`check_exact`; a sentence for each other.

    They are tried one by one only if all together are not exact.

    Args:
        changes: by the path of the module that each is about.
        make: makes some of them in a network, in place.
        what: the subject of the sentences, in front of the path.
    """

    def complaint(some: dict[str, T], about: str) -> str | None:
        try:
            check_exact(model, lambda copied, _: make(copied, some), batch, about)
        except NotChecked:
            raise
        except PlanishError as error:
            return str(error)
        return None

    every = dict(changes)
    if not every:
        return {}, []
    first, *more = every
    try:
        if complaint(every, f"{what} {first}" + f" and {len(more)} more" * bool(more)) is None:
            return every, []
    except NotChecked as error:
        return {}, [str(error)]
    found = {path: complaint({path: change}, f"{what} {path}") for path, change in every.items()}
    exact = {path: change for path, change in every.items() if found[path] is None}
    said = [text for text in found.values() if text is not None]
    if exact and (together := complaint(exact, f"{what} {', '.join(exact)} together")) is not None:
        return {}, [*said, together]
    return exact, said


def few_images(batch: Any) -> Any:
    """The first images of a batch: enough to see what the network does."""
    return map_tensors(batch, lambda tensor: tensor[:IMAGES])


def relative_change(now: Tensor, before: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest magnitude of the second; NaN if one is not finite."""
    return float((now - before).abs().max() / before.abs().max().clamp(min=torch.finfo(before.dtype).tiny))


def require_float(calibration: Calibration, name: str) -> None:
    """Raise :class:`PlanishError` if the network has taps: a pass that changes the float network has to come first.

    What was kept of that network is let go, because it will be another one.
    """
    if next(taps_of(calibration.model), None) is not None:
        raise PlanishError(f"{name} changes the network in float: put it before the passes that quantize anything")
    calibration.float_changes()
