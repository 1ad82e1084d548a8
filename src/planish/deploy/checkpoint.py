"""``planish.save`` and ``planish.load``: a model as one file from which it comes back without the training script.

The format is described in ``docs/checkpoint.md``. Weights of quantized sites are stored as codes at their true width,
everything else as it is; the recipe of the architecture, the plan of what is quantized and the protocol are JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.deploy.origin import find_classes, find_preprocessing, find_recipes
from planish.deploy.packed.agreement import check_agreement
from planish.deploy.packed.architecture import built, check_recipe, layout_of, recipe_layout
from planish.deploy.packed.container import (
    KEY,
    names_itself,
    read_data,
    read_table,
    refusing,
    to_bytes,
)
from planish.deploy.packed.content import Content, content_of
from planish.deploy.packed.head import Head, read_head_from, version_of, write_head
from planish.deploy.packed.restoring import Restoring
from planish.deploy.packed.values import one_line
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.models.weights import write_whole
from planish.network.folding import tensors_in
from planish.network.modes import evaluating
from planish.task import CLASSES, task_of


@torch.no_grad()
def save(
    model: nn.Module,
    path: Path | str,
    *,
    recipe: Mapping[str, Any] | str | None = None,
    preprocessing: Preprocessing | None = None,
    protocol: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] | list[str] | None = None,
    verify: bool = True,
) -> None:
    """Write a model, quantized or in float, as one safetensors file; see :func:`load`.

    What is not given is taken from the model: :func:`planish.load_model` leaves it there, and copies, flattening,
    quantization and training keep it.

    Args:
        model: what :func:`planish.quantize`, ``train`` or ``flatten`` gave back, or any classifier in float.
        path: the file; it holds the old or the new content, never a part.
        recipe: what builds the architecture: a timm name, ``"torchvision:NAME"``, ``"file.py:function"``, or
            ``{"source": "timm", "architecture": name, "arguments": {...}}``, where the source may be ``"torchvision"``
            or ``"hf"``, too. For a model of timm or transformers it can be found out.
        preprocessing: what the images go through.
        protocol: all that the model's numbers depend on; plain values.
        classes: their names, in the order of the logits.
        verify: read the file again before it is moved into place and compare the outputs for one image, bit for bit
            (on the CPU; not for a recipe that runs a Python file).

    Raises:
        PlanishError: the architecture is not known, quantizers are being trained, a tensor cannot be stored exactly,
            or the file cannot be written.
    """
    path = Path(path)
    images = find_preprocessing(model, preprocessing)
    card = dict(getattr(model, "planish_protocol", None) or {}) if protocol is None else dict(protocol)
    if (task := task_of(model)) is not CLASSES:
        card["task"] = task.name
    content = content_of(model)
    chosen = _fitting_recipe(find_recipes(model, recipe), content, given=recipe is not None)
    head = replace(
        content.head, recipe=chosen, preprocessing=images, protocol=card,
        classes=find_classes(model, classes),
    )  # fmt: skip
    check = None
    if verify and chosen["source"] != "file":

        def check(written: Path) -> None:
            _verify(model, written, images)

    write_whole(path, to_bytes(content.tensors, write_head(head)), check)


def _fitting_recipe(recipes: list[dict[str, Any]], content: Content, given: bool) -> dict[str, Any]:
    """The first recipe whose architecture has the tensors of the model; a Python file is taken at its word."""
    why = ""
    for recipe in recipes:
        if recipe["source"] == "file":
            return recipe
        try:
            check_recipe(recipe)
            layout = recipe_layout(recipe, content.head.rebuilt, len(content.entries))
            check_agreement(content.head, content.entries, layout)
            return recipe
        except PlanishError as error:
            why = why or f" ({one_line(error)})"
    if given:
        raise PlanishError(f"the recipe does not build this model{why}")
    raise PlanishError(
        f"it is not known how to build this {content.name} again{why}: give save(..., recipe=) a timm name, "
        f'"torchvision:NAME", "file.py:function", or {{"source": SOURCE, "architecture": NAME, "arguments": {{...}}}}'
    )


def _verify(model: nn.Module, path: Path, images: Preprocessing) -> None:
    try:
        loaded = load(path)
    except PlanishError as error:
        raise PlanishError(f"the model could not be restored from its file: {one_line(error)}") from None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if like.device.type != "cpu":
        return
    image = torch.randn(1, *images.input_size, generator=torch.Generator().manual_seed(0)).to(like.dtype)
    try:
        with evaluating(model):
            outputs = [tensors_in(network(image)) for network in (model, loaded)]
    except Exception as error:  # the model's own about the image
        raise PlanishError(
            f"the model does not run on an image of {images.input_size}, as its preprocessing makes them: "
            f"{one_line(error)}; give save(..., preprocessing=)"
        ) from None
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*outputs, strict=True))
    if not same:
        raise PlanishError(
            "the model restored from the file computes something else: give save(..., recipe=) all arguments of its "
            "architecture"
        )


def read_head(path: Path | str) -> Head | None:
    """What the metadata of a checkpoint say; nothing is built, no code is run. None if ``path`` is no checkpoint.

    It may then be plain weights, in safetensors or torch's format, or nothing of the kind. The tensors are not read, so
    that altered ones are not noticed.

    Raises:
        PlanishError: the file is damaged or of another version.
    """
    path = Path(path)
    with refusing(path), path.open("rb") as file:
        if not names_itself(file):
            return None
        return read_head_from(version_of(read_table(file).metadata, KEY))


@torch.no_grad()
def load(path: Path | str, *, trust: bool = False) -> nn.Module:
    """The model in a file that :func:`save` wrote, in evaluation mode on the CPU.

    Its weights are the values of their grids, so that it computes what the saved model computed, bit for bit. Its
    attributes ``planish_recipe``, ``planish_preprocessing``, ``planish_protocol`` and ``planish_classes`` hold what the
    file says beside the tensors; a quantized one has its plan, which :func:`planish.ledger` prints.

    Args:
        trust: whether a Python file that the checkpoint names as its architecture may be run.

    Raises:
        PlanishError: the file is no checkpoint, incomplete, altered, of another version, does not fit the architecture
            that it names, or names code to run without ``trust``. Until all sizes have been compared, no more memory is
            taken than the file has bytes, and some for its metadata.
    """
    path = Path(path)
    with refusing(path):
        with path.open("rb") as file:
            table = read_table(file)
            content = version_of(table.metadata, KEY)
            data = read_data(file, table)
        head = read_head_from(content)
        if head.recipe.get("source") == "file":
            model = _from_file(head, trust)
            layout = layout_of(model)
            check_agreement(head, table.entries, layout)
        else:
            check_recipe(head.recipe)
            layout = recipe_layout(head.recipe, head.rebuilt, len(table.entries))
            check_agreement(head, table.entries, layout)
            model = None
        restored = Restoring(head, table, data)
        restored.check()
        return restored.into(model or built(head.recipe, head.rebuilt), layout)


def _from_file(head: Head, trust: bool) -> nn.Module:
    path, function = head.recipe.get("path"), head.recipe.get("function")
    if not isinstance(path, str) or not isinstance(function, str):
        raise PlanishError("its recipe names no Python file and function")
    if not trust:
        raise PlanishError(f"is a network that the Python file {path} builds: give trust=True to run the code in it")
    return built(head.recipe, head.rebuilt, trust=True)
