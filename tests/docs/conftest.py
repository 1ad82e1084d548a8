"""A place in which commands and code of the pages run in seconds: few images, and small stand-ins for networks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import _registry

from planish.data import load as loading
from planish.ptq import METHODS, with_settings

SMALL = {  # what the pages name, and how it is made small
    "vit_small_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": (8, 8, 16, 16)},
}


def pictures(folder: Path, count: int, mode: str, size: int) -> None:
    """Noise, a little brighter from folder to folder."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(str(folder)))
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    for i in range(count):
        pixels = generator.integers(0, 200, shape) + 10 * (len(folder.name) % 5)
        Image.fromarray(pixels.astype("uint8"), mode).save(folder / f"{i}.png")


def _stand_in(name, original):
    def build(pretrained=False, **kwargs):
        model = original(False, **{**SMALL[name], **kwargs})
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
        return model

    return build


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with the files that the pages speak of."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    with np.load(loading._ARCHIVE, allow_pickle=False) as archive:
        few = {name: archive[name][: 160 if name.startswith("train") else 60] for name in archive.files}
    np.savez(tmp_path / "few.npz", **few)
    monkeypatch.setattr(loading, "_ARCHIVE", tmp_path / "few.npz")
    Image.fromarray(few["test_images"][0].squeeze()).save("photo.jpg")
    pictures(tmp_path / "unlabelled", 40, "L", 28)
    for split, count in (("train", 16), ("val", 4)):
        for label in ("ant", "bee", "wasp!"):
            pictures(tmp_path / "my_images" / split / label, count, "RGB", 32)
    for name in ("best-cnn", "best-vit"):
        method = METHODS[name]
        few_steps = with_settings(method.passes(), iterations=2, steps=2)
        monkeypatch.setitem(METHODS, name, replace(method, passes=partial(list, few_steps)))
    for name in SMALL:
        monkeypatch.setitem(_registry._model_entrypoints, name, _stand_in(name, _registry.model_entrypoint(name)))
    return tmp_path


@pytest.fixture
def weights(place):
    """``my.safetensors`` for one of the stand-ins."""

    def write(name: str) -> None:
        torch.manual_seed(0)
        save_file(timm.create_model(name, num_classes=3).state_dict(), place / "my.safetensors")

    return write
