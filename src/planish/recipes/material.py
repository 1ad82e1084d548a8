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

from planish.data import EncodedImages, ImageData, calibration_subset, load_data, load_unlabelled, make_loader
from planish.data.listing import enumerated
from planish.errors import PlanishError
from planish.models import LoadedModel, check_classes, check_output, classes_of, load_model, loses_head
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
        return _with_processes(found)


@dataclass
class Sample:
    """The network as it was given, on the device where it will run, and the images on which its ranges are set.

    Attributes:
        source: what the images are called in a protocol.
        classes: the names of the classes; ``None`` if nobody knows any.
        found: what a resumed command must find again.
    """

    loaded: LoadedModel
    calibration: DataLoader[Any]
    source: str
    classes: list[str] | None
    found: dict[str, Any]

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.calibration.dataset)  # type: ignore[arg-type]


def prepare_sample(config: RunConfig, console: Console, *, unlabelled: Path | None = None, task: str = "") -> Sample:
    """Load the model and a few images to set ranges on: of the data, or of a folder of images without labels."""
    options = config.models
    if unlabelled is None:
        material = prepare(config, console, task=task)
        names = material.data.name
        return Sample(material.loaded, material.calibration, names, material.classes, material.fingerprint())
    if options.data is not None:
        raise PlanishError(f"give --data {options.data} or --unlabelled {unlabelled}: calibration reads one of them")
    loaded = _load(config, task)
    images, found = read_unlabelled(unlabelled, loaded, options.seed, console)
    check_output(loaded.model, images[0][0], str(unlabelled))
    calibration = _calibration(config, images, [-1] * len(images), console)
    found = _with_processes({"checkpoint": loaded.weights_hash, **found})
    classes = getattr(loaded.model, "planish_classes", None)
    return Sample(loaded, calibration, f"{unlabelled}, without labels", classes, found)


def read_unlabelled(
    folder: Path, loaded: LoadedModel, seed: int, console: Console
) -> tuple[EncodedImages, dict[str, Any]]:
    """The images of a folder without labels, and what a resumed command must find again of them."""
    images, notes = load_unlabelled(folder, loaded.preprocessing, seed=seed, progress=watch_images(console))
    for note in notes:
        say(console, f"note: {note}")
    return images, {"unlabelled_images": len(images), "unlabelled_hash": images.content}


def prepare(config: RunConfig, console: Console, *, calibrate: bool = True, task: str = "") -> Material:
    """Load model and images and check that they belong together, before anything long begins.

    ``task``: what the outputs mean (:mod:`planish.task`), if it is said.
    """
    options = config.models
    loaded = _load(config, task)
    data = load_data(options.data, loaded.preprocessing, seed=options.seed, progress=watch_images(console))
    for note in data.notes:
        say(console, f"note: {note}")
    check_classes(loaded.model, data)
    whole = len(data.train_labels) >= options.batch_size
    train = _loader(config, data.train, shuffle=True, drop_last=whole, augment=True)
    calibration = _calibration(config, data.train, data.train_labels, console if calibrate else None)
    return Material(loaded, data, train, calibration, _loader(config, data.test, shuffle=False))


def _load(config: RunConfig, task: str) -> LoadedModel:
    """The network, on the device where it will run."""
    options = config.models
    loaded = load_for(task, options.model, options.weights)
    if next(loaded.model.parameters(), None) is None:
        raise PlanishError(f"{options.model} has no parameters, so there is nothing to quantize")
    loaded.model.to(make_accelerator(config.train.mixed_precision).device)
    return loaded


def _loader(config: RunConfig, dataset: Any, **kwargs: Any) -> DataLoader[Any]:
    options = config.models
    return make_loader(dataset, options.batch_size, seed=options.seed, workers=options.workers, **kwargs)


def _calibration(config: RunConfig, dataset: Any, labels: list[int], console: Console | None) -> DataLoader[Any]:
    """The images that ranges are set on; fewer than were asked for if there are no more, which the console says."""
    wanted, images = config.quantize.calibration_images, len(labels)
    if wanted > images and console is not None:
        what = "images without labels" if -1 in labels else "training images"
        say(console, f"note: calibration on all {images} {what}, which is fewer than the {wanted} asked for")
    return _loader(config, calibration_subset(dataset, labels, min(wanted, images), config.models.seed), shuffle=False)


def _with_processes(found: dict[str, Any]) -> dict[str, Any]:
    processes = count_processes()  # each takes batches of its own
    return found if processes == 1 else {**found, "processes": processes}


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
