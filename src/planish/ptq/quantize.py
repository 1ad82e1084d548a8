"""``planish.quantize``: a model and a few images in, the quantized model out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import assign, taps_of, watch
from planish.network.batches import first_image, split_batch, to_device
from planish.network.faults import BadBatch, going_through, sound
from planish.ptq.journal import Journal, fingerprint
from planish.ptq.methods import get_method
from planish.ptq.passes import Calibration, Pass, run_logits, run_passes
from planish.scheme import Scheme
from planish.task import say_task


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    scheme: Scheme | str = "w4a4",
    method: str | Sequence[Pass] = "rtn",
    *,
    allow: Iterable[str] = (),
    task: str | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """Quantize a copy of ``model``; the given one is left untouched.

    Args:
        model: a trained network in float: a classifier, or one that gives features.
        calibration: batches of images (labels, if there are any, are not read).
        scheme: ``"w4a4"`` and the like, or a :class:`~planish.scheme.Scheme`.
        method: the name of a method, or a list of passes.
        allow: shell patterns of products that may stay in float.
        task: what the outputs mean (:mod:`planish.task`): ``classes`` (the default), ``labels`` or ``features``.
        checkpoint_dir: folder in which methods that learn keep each unit that is done; it is left there.
        resume: take what is done from ``checkpoint_dir``; the result is that of an uninterrupted quantization.
        log: receives one record per pass, as it ends (loss and agreement before and after on the first 128 calibration
            images, seconds), and what passes have to say in between.
        progress: called with the share that is done of a pass that takes long.

    Returns:
        A model of the same behaviour whose matrix products see quantized operands. Its attribute
        ``planish_assignment`` holds the plan; :func:`planish.ledger` prints it. What no pass of a list rounds is in
        float there, too, and the log has a note of it.

    Raises:
        PlanishError: no calibration image, a batch that holds NaN or that the model cannot take, an unknown scheme or
            method, a product that no tap covers, values that are not finite, a
            ``checkpoint_dir`` of another quantization.
    """
    if isinstance(calibration, torch.Tensor):
        raise PlanishError("the calibration is one tensor: give batches of images, such as images.split(64)")
    scheme = Scheme.parse(scheme)
    passes = get_method(method).passes() if isinstance(method, str) else list(method)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches = [to_device(split_batch(batch)[0], device) for batch in sound(calibration, "calibration")]
    if not batches:
        raise PlanishError("there is no calibration batch: pass a loader with at least one batch of images")
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    say_task(twin, task)
    patterns = (allow,) if isinstance(allow, str) else tuple(allow)
    plan = assign(watch(twin, first_image(batches[0])), scheme, allow=patterns)
    work = Calibration(twin, batches, plan, _reference(twin, batches), given=model, allow=patterns)
    if checkpoint_dir is not None:
        settings = fingerprint(scheme.describe(), passes, work.reference, allow=sorted(patterns), task=task)
        work.journal = Journal(checkpoint_dir, resume=resume, settings=settings)
    work.tell, work.progress = log or work.tell, progress or work.progress
    run_passes(work, passes)
    taps = dict(taps_of(work.model))
    bare = [site.name for site, _ in work.assignment.quantized() if site.name not in taps]
    if bare:
        work.note("quantize", f"no pass of the list rounds {bare[0]} ({len(bare)} sites in all): they stay in float")
    work.model.planish_assignment = work.assignment.only(taps)  # type: ignore[assignment]
    return work.model


def _reference(model: nn.Module, batches: Sequence[Any]) -> list[torch.Tensor]:
    """The logits of every batch; an error names the batch that the model cannot take."""
    logits = []
    for number, batch in enumerate(batches, 1):
        try:
            with going_through(batch):
                logits += run_logits(model, [batch])
        except BadBatch as error:
            raise PlanishError(f"batch {number} of the calibration loader {error}") from error
    return logits
