"""The stages of a diagnosis: what is measured of one network, each a function of the network made ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from planish.flatness.curvature import curvature
from planish.flatness.damage import corruption_damage, damage, switched
from planish.flatness.errors import error_model
from planish.flatness.landscape import landscape_line, landscape_plane
from planish.flatness.perturbations import chosen
from planish.flatness.prediction import predict
from planish.flatness.sharpness import sharpness
from planish.flatness.split import split_loss
from planish.flatness.subject import Subject
from planish.models import Preprocessing
from planish.recipes.effort import Effort


@dataclass
class Look:
    """What a stage works with."""

    subject: Subject
    scheme: str
    schemes: Sequence[str]
    effort: Effort
    seed: int
    fp_top1: float  # on the test images
    float_logits: Tensor  # of the test images
    low_logits: Tensor
    labels: Tensor
    classes: Sequence[str]
    corrupted: Any  # loader of the test images that are corrupted
    preprocessing: Preprocessing
    progress: Callable[[float], None]


def _errors(look: Look) -> Any:
    return error_model(look.subject, look.scheme, images=look.effort.layer_images, seed=look.seed)


def _split(look: Look) -> Any:
    return split_loss(
        look.subject, look.scheme, images=look.effort.layer_images, seed=look.seed, progress=look.progress
    )


def _curvature(look: Look) -> Any:
    effort, subject = look.effort, look.subject
    return curvature(
        subject, batches=chosen(subject, effort.layer_images), probes=effort.probes, steps=effort.steps,
        seed=look.seed, progress=lambda done, most: look.progress(done / most),
    )  # fmt: skip


def _sharpness(look: Look) -> Any:
    effort = look.effort
    return sharpness(look.subject, look.scheme, images=effort.layer_images, draws=effort.draws, seed=look.seed)


def _landscape(look: Look) -> Any:
    effort, few = look.effort, look.effort.layer_images
    line = landscape_line(look.subject, draws=effort.draws, images=few, seed=look.seed)
    plane = landscape_plane(look.subject, points=effort.plane, images=few, seed=look.seed)
    return {"line": [asdict(point) for point in line], "plane": asdict(plane)}


def _prediction(look: Look) -> Any:
    reference = look.subject.logits()
    return [
        asdict(predict(look.subject, scheme, look.fp_top1, draws=2, seed=look.seed, reference=reference))
        for scheme in look.schemes
    ]


def _damage(look: Look) -> Any:
    names = look.classes if len(look.classes) == look.float_logits.shape[-1] else None
    found = asdict(damage(look.float_logits, look.low_logits, look.labels, names))
    corruptions = corruption_damage(
        switched(look.subject), switched(look.subject, look.scheme), look.corrupted, look.preprocessing, seed=look.seed,
        progress=lambda done, batches: look.progress(done / batches if batches else 0.0),
    )  # fmt: skip
    return {**found, "corruptions": [asdict(one) for one in corruptions]}


STAGES: dict[str, tuple[str, float, Callable[[Look], Any]]] = {
    # by the key in the results: what it is called while it runs, and roughly what it costs
    "errors": ("errors of the grids", 1.0, _errors),
    "split": ("what weights and activations lose, layer by layer", 4.0, _split),
    "curvature": ("curvature", 6.0, _curvature),
    "sharpness": ("sharpness", 2.0, _sharpness),
    "landscape": ("landscape", 3.0, _landscape),
    "prediction": ("prediction", 2.0, _prediction),
    "damage": ("damage beyond top-1", 3.0, _damage),
}


def run_stage(name: str, look: Look) -> Any:
    """The result of a stage as plain values."""
    found = STAGES[name][2](look)
    return found if isinstance(found, (dict, list)) else asdict(found)
