"""Quantized models on disk: weights, scales and the plan in one safetensors file.

The weights are stored in float, next to the scales of their grids; ``load_quantized`` rebuilds the model from the
recipe in the metadata and puts the quantizers back. Format version 0: it will change when weights are packed at their
true width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.errors import PlanishError
from planish.models import build, preprocessing_from, read_weights, save_weights
from planish.models.preprocessing import Preprocessing
from planish.network import Assignment, Site, assign, attach, watch
from planish.network.rebuilding import rebuild, rebuilt
from planish.network.taps import CHILD
from planish.quantizers import ShiftedQuantizer, UniformQuantizer
from planish.scheme import Format, Scheme

VERSION = 0
KEY = "planish_quantized"


def weights_megabytes(model: nn.Module) -> float:
    """Size of the parameters in 10^6 bytes: quantized ones at their bits and fp32 scales, the rest as is."""
    plan: Assignment | None = getattr(model, "planish_assignment", None)
    bits: dict[int, int] = {}  # by identity: a tied weight has several names
    for site, fmt in plan.quantized() if plan else ():
        if site.parameter:
            bits[id(model.get_submodule(site.owner)._parameters[site.slot])] = fmt.bits
    total = sum(p.numel() * (bits[id(p)] / 8 if id(p) in bits else p.element_size()) for p in model.parameters())
    scales = (m.scale.numel() for m in model.modules() if isinstance(m, UniformQuantizer) and m.fitted)
    return (total + 4 * sum(scales)) / 1e6


def save_quantized(
    model: nn.Module, path: Path, recipe: Mapping[str, Any], preprocessing: Preprocessing, protocol: Mapping[str, Any]
) -> None:
    """Write a model from :func:`planish.quantize`, with the recipe of its architecture and its protocol card."""
    plan: Assignment | None = getattr(model, "planish_assignment", None)
    if plan is None:
        raise PlanishError("only a model that planish.quantize gave back can be saved as a quantized model")
    head = {
        "version": VERSION, "recipe": dict(recipe), "preprocessing": preprocessing.to_dict(),
        "rebuilt": rebuilt(model),
        "scheme": asdict(plan.scheme), "allow": [escape(product.name) for product in plan.allowed],
        "protocol": dict(protocol),
    }  # fmt: skip
    save_weights(model, path, {KEY: json.dumps(head, default=str)})


def load_quantized(path: Path, *, trust: bool = False) -> tuple[nn.Module, dict[str, Any]] | None:
    """The quantized model in ``path`` and its metadata; ``None`` if the file holds plain weights.

    Raises:
        PlanishError: the file is damaged, of a later version, or names code to run without ``trust``.
    """
    state, metadata = read_weights(path)
    if KEY not in metadata:
        return None
    head, scheme = _read_head(metadata[KEY], path)
    recipe, preprocessing, allow = head["recipe"], head["preprocessing"], head["allow"]
    if recipe.get("source") == "file" and not trust:
        raise PlanishError(
            f"{path} is a network that the Python file {recipe.get('path')} builds: "
            f"give trust=True to run the code in it"
        )
    model = build(recipe, trust=trust).eval()
    rebuild(model, head["rebuilt"])
    example = torch.zeros(1, *preprocessing.input_size)
    plan = assign(watch(model, example), scheme, allow=allow)
    _add_biases(model, state)
    formats = {site.name: fmt for site, fmt in plan.quantized()}

    def tap(site: Site) -> nn.Module | None:
        if site.name not in formats:
            return None
        prefix = ".".join(part for part in (site.owner, CHILD, site.slot) if part)
        kind = ShiftedQuantizer if f"{prefix}.before" in state else UniformQuantizer
        return kind(formats[site.name], channel_axis=site.channel_axis or 0)

    attach(model, plan.products, tap)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise PlanishError(
            f"{path} does not fit the architecture it names: {str(error).splitlines()[-1].strip()}"
        ) from None
    model.planish_assignment = plan  # type: ignore[assignment]
    return model.requires_grad_(False), head


def read_head(path: Path) -> dict[str, Any] | None:
    """The metadata of a quantized model; nothing is built and no code is run. ``None`` if ``path`` has plain weights.

    Raises:
        PlanishError: the file is damaged or of a later version.
    """
    _, metadata = read_weights(path)
    return _read_head(metadata[KEY], path)[0] if KEY in metadata else None


def _read_head(text: str, path: Path) -> tuple[dict[str, Any], Scheme]:
    try:
        head = json.loads(text)
        version = head["version"]
        if version != VERSION:
            raise PlanishError(f"{path} has format version {version}; this planish reads version {VERSION}")
        fields = dict(head["scheme"])
        fields["weights"] = Format(**fields["weights"])
        fields["activations"] = fields["activations"] and Format(**fields["activations"])
        fields["overrides"] = tuple((product, notation) for product, notation in fields.get("overrides", ()))
        read = {
            "recipe": dict(head["recipe"]), "preprocessing": preprocessing_from(head["preprocessing"]),
            "allow": list(head["allow"]), "rebuilt": [dict(note) for note in head["rebuilt"]],
        }  # fmt: skip
        return {**head, **read}, Scheme(**fields)
    except PlanishError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise PlanishError(f"{path}: its metadata cannot be read ({error}); quantize the model again") from None


def _add_biases(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Room for the biases that folding BatchNorm has given to layers without one; the norms stay, as identities."""
    for path, module in model.named_modules():
        key = f"{path}.bias" if path else "bias"
        if key in state and module._parameters.get("bias", 0) is None:
            module._parameters["bias"] = nn.Parameter(torch.empty_like(state[key]))
