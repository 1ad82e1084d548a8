"""Data sets of Hugging Face ``datasets``: folders that ``save_to_disk`` wrote, and names on the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planish.data.decode import read_file
from planish.data.listing import Found
from planish.data.rows import Labelled, arrange, choose_splits
from planish.errors import PlanishError

HUB = "hf:"
_LABEL_TYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"string", "large_string"}
_EXPECTED = "expected one column of images (Image) and one of classes (ClassLabel, or integers or names called label)"
_ADVICE = "choose with select_columns and write it with save_to_disk"


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The image in one row of a data set, still encoded.

    Attributes:
        images: a ``datasets.Dataset`` with the column ``image``, not decoded. It maps its files into memory, and
            goes to worker processes by their names.
        index: the row.
        split: what messages call the data set.
        state: changes when the files of the data set do; ``None`` where images lie elsewhere.
    """

    images: Any
    index: int
    split: str
    state: str | None = None

    @property
    def stamp(self) -> str | None:
        """Changes when the data set is written again."""
        return None if self.state is None else f"{self.state}|{self.index}"

    def read_bytes(self) -> bytes:
        cell = self.images[self.index]["image"]
        if cell is None:
            raise OSError("the row has no image")
        if cell["bytes"] is not None:
            return cell["bytes"]
        if cell["path"] is None or "://" in cell["path"]:
            raise OSError(f"the row has no bytes and no file on this machine ({cell['path']})")
        return read_file(Path(cell["path"]))

    def __str__(self) -> str:
        return f"{self.split}[{self.index}]"


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one or (path / "dataset_dict.json").is_file()


def find_saved(path: Path) -> Found:
    """What a folder holds that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    Raises:
        PlanishError: ``datasets`` is not installed, the folder is damaged, or has not the columns and splits it takes.
    """
    library = _library(path)
    loaded = _attempt(path, lambda: library.load_from_disk(str(path)))
    return _find(path.resolve().name, path, loaded, library)


def find_on_hub(source: str) -> Found:
    """The data set ``hf:NAME`` or ``hf:NAME:CONFIG``, from the cache of ``datasets`` or from the network.

    Raises:
        PlanishError: ``datasets`` is not installed, there is no such data set, or it has not the columns and splits.
    """
    name, _, config = source.removeprefix(HUB).partition(":")
    if not name:
        raise PlanishError(
            f"{source} names no data set: expected hf:NAME or hf:NAME:CONFIG, such as hf:uoft-cs/cifar10"
        )
    library = _library(source)
    loaded = _attempt(source, lambda: library.load_dataset(name, config or None))
    return _find(name, Path(source), loaded, library)


def _library(source: object) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise PlanishError(
            f"{source} is read with the package datasets, which is not here ({error}): pip install 'planish[data]'"
        ) from error
    return datasets


def _attempt(source: object, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # of pyarrow, fsspec, httpx, ...: all are about this source
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PlanishError(f"{source} cannot be loaded as a data set of Hugging Face datasets: {reason}") from error


def _find(name: str, where: Path, loaded: Any, library: Any) -> Found:
    """The listing of a Dataset, or of the splits in use of a DatasetDict."""
    notes: list[str] = []
    rows: list[Labelled] = []
    classes: dict[str, list[str] | None] = {}
    if isinstance(loaded, library.Dataset):
        classes["all"] = _read(where, loaded, "", library, rows)
    else:
        by_name = {split.lower(): split for split in reversed(loaded)}
        train, test, unused = choose_splits(where, by_name)
        for split in (train, test) if test is not None else (train,):
            classes[split] = _read(where, loaded[by_name[split]], split, library, rows)
        if unused:
            notes.append(f"{where}: the split {' and '.join(unused)} was left out")
        if test is not None and classes[train] != classes[test]:
            raise PlanishError(f"{where}: the splits {train} and {test} name different classes: they must be the same")
    found = arrange(name, where, rows, next(iter(classes.values())))
    found.notes += notes
    return found


def _read(where: Path, dataset: Any, split: str, library: Any, rows: list[Labelled]) -> list[str] | None:
    """Append the rows of a split, and give the names of the classes where the data set knows them."""
    image, label = _columns(where, dataset.features, library)
    dataset = dataset.with_format(None)
    images = dataset.select_columns([image]).cast_column(image, library.Image(decode=False))
    images = images.rename_column(image, "image") if image != "image" else images
    labels = dataset.select_columns([label])[:][label]
    feature = dataset.features[label]
    classes = list(feature.names) if isinstance(feature, library.ClassLabel) else None
    if missing := sum(value is None or value == "" or (classes is not None and value < 0) for value in labels):
        raise PlanishError(
            f"{where}: {missing} of {len(labels)} labels{f' of the split {split}' if split else ''} are missing: "
            "leave out images whose label is not known"
        )
    state = _state(images)
    for i, value in enumerate(labels):
        rows.append(Labelled(Row(images, i, split or "row", state), str(value), split or None))
    return classes


def _state(images: Any) -> str | None:
    """The files of a data set that holds its images itself, with their sizes and times of change."""
    column = images.data.column("image")
    if not images.cache_files or any(chunk.field("bytes").null_count for chunk in column.chunks):
        return None
    found = []
    for name in sorted({file["filename"] for file in images.cache_files}):
        status = os.stat(name)
        found.append(f"{os.path.abspath(name)}|{status.st_size}|{status.st_mtime_ns}")
    return f"{'|'.join(found)}|{images._fingerprint}"


def _columns(where: Path, features: Any, library: Any) -> tuple[str, str]:
    """The columns of images and labels, by their types; without ClassLabel, integers or names in the column "label"."""
    images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    if not labels and getattr(features.get("label"), "dtype", "") in _LABEL_TYPES:
        labels = ["label"]
    for kind, found in (("images", images), ("classes", labels)):
        if len(found) != 1:
            told = f"{len(found)} columns of {kind} ({', '.join(found)})" if found else f"no column of {kind}"
            raise PlanishError(f"{where} has {told} among {', '.join(features)}: {_EXPECTED}; {_ADVICE}")
    return images[0], labels[0]
