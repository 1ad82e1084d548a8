"""Every command and every block of Python of the first page and the guides is run, with few images and steps."""

from __future__ import annotations

import re
import shlex

import pytest

from planish.cli.main import main
from tests.docs.blocks import commands, python

PAGES = {
    "start.md": None, "guide/timm-vit.md": "vit_small_patch16_224", "guide/few-images.md": None,
    "guide/train.md": "resnet18", "guide/onnx-runtime.md": None,
}  # fmt: skip
ONE_THREAD = ("run", "flatten", "quantize", "train", "evaluate")
WRITES = {"flatten", "quantize", "train", "export"}


def short(command: str) -> list[str]:
    """The command with few steps and images, on one thread."""
    command = re.sub(r"(--iterations|--epochs) \d+", lambda m: f"{m[1]} {2 if 'iter' in m[1] else 1}", command)
    words = shlex.split(command)[1:]
    if words[0] in ONE_THREAD:
        words += ["--threads", "1", "--batch-size", "16" if "my_images" in command else "64"]
    if words[0] in ("quantize", "run", "export"):
        words += ["--calibration-images", "40"]
    return words + (["--no-timing", "--images", "20"] if words[0] == "export" else [])


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_the_code(page, place, weights, capsys):
    if PAGES[page]:
        weights(PAGES[page])
    found = commands(page)
    for command in found:
        words = short(command)
        assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
        if words[0] in WRITES:
            assert (place / words[words.index("--out") + 1]).stat().st_size > 1000
    space: dict[str, object] = {}
    for block in python(page):
        exec(compile(block.replace("train_labels, 512)", "train_labels, 40)"), page, "exec"), space)
    assert len(found) + len(python(page)) >= 2
