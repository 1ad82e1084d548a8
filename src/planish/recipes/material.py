"""What every part of a run works with: the network, the images, the loaders."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from rich.console import Console
from torch.utils.data import DataLoader

from planish.data import ImageData, calibration_subset, load_data, make_loader
from planish.data.listing import enumerated
from planish.errors import PlanishError
from planish.models import LoadedModel, check_classes, classes_of, load_model, loses_head
from planish.recipes.config import RunConfig
from planish.recipes.processes import count_processes
from planish.recipes.session import say
from planish.task import FEATURES, say_task
from planish.training import make_accelerator


@dataclass
class Material:
    """The network as it was given, on the device where it will run, the images, and a loader for each purpose."""

    loaded: LoadedModel
    data: ImageData
    train: DataLoader[Any]
    calibration: DataLoader[Any]
    test: DataLoader[Any]

    @property
    def device(self) -> Any:
        """Where the network is."""
        return next(self.loaded.model.parameters()).device

    @property
    def classes(self) -> list[str]:
        """The names of the classes: the network's own if it has any, else the data's."""
        return classes_of(self.loaded.model, self.data)

    @property
    def test_images(self) -> int:
        """How many images the networks are evaluated on."""
        return len(self.data.test)  # type: ignore[arg-type]

    @property
    def calibration_images(self) -> int:
        """How many images the ranges are set on."""
        return len(self.calibration.dataset)  # type: ignore[arg-type]

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        found = {
            "checkpoint": self.loaded.weights_hash, "train_images": len(self.data.train_labels),
            "test_images": self.test_images,
        }  # fmt: skip
        if self.data.content:
            found["images_hash"] = self.data.content
        processes = count_processes()  # each takes batches of its own
        return found if processes == 1 else {**found, "processes": processes}


def prepare(config: RunConfig, console: Console, *, calibrate: bool = True, task: str = "") -> Material:
    """Load model and images and check that they belong together, before anything long begins.

    ``task``: what the outputs mean (:mod:`planish.task`), if it is said.
    """
    options = config.models
    loaded = load_for(task, options.model, options.weights)
    if next(loaded.model.parameters(), None) is None:
        raise PlanishError(f"{options.model} has no parameters, so there is nothing to quantize")
    data = load_data(options.data, loaded.preprocessing, seed=options.seed, progress=watch_images(console))
    for note in data.notes:
        say(console, f"note: {note}")
    check_classes(loaded.model, data)
    loaded.model.to(make_accelerator(config.train.mixed_precision).device)
    size, seed, images = options.batch_size, options.seed, len(data.train_labels)

    def loader(dataset: Any, **kwargs: Any) -> DataLoader[Any]:
        return make_loader(dataset, size, seed=seed, workers=options.workers, **kwargs)

    wanted = config.quantize.calibration_images
    if wanted > images and calibrate:
        say(console, f"note: calibration on all {images} training images, which is fewer than the {wanted} asked for")
    subset = calibration_subset(data.train, data.train_labels, min(wanted, images), seed)
    train = loader(data.train, shuffle=True, drop_last=images >= size, augment=True)
    return Material(loaded, data, train, loader(subset, shuffle=False), loader(data.test, shuffle=False))


def tell_replaced(material: Material, console: Console) -> dict[str, Any]:
    """What became unreadable in training and was replaced: a note, and an entry for the protocol; empty if nothing did.

    Of several processes each knows what it has read itself; all of them have to come here.
    """
    own = getattr(material.train.dataset, "replaced", [])
    found = own if count_processes() == 1 else gather_object(own)
    if not found:
        return {}
    names = sorted(set(found))
    say(console, f"note: {len(names)} training images could not be read any more, and others of their class took "
                 f"their place: {enumerated(names)}")  # fmt: skip
    return {"images_replaced": len(names)}


def load_for(task: str, name: str, weights: Path | None) -> LoadedModel:
    """A network whose outputs mean what is said; an embedded one, or one of timm, gives features without its head."""
    headless = task == FEATURES.name and loses_head(name)
    loaded = load_model(name, weights=weights, num_classes=0 if headless else None, trust=True)
    say_task(loaded.model, task or None)
    return loaded


def watch_images(console: Console) -> Callable[[int, int], None]:
    """Say how far the check of the images is, every ten seconds."""
    last = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            say(console, f"reading the images once: {done} of {total}")

    return progress
