"""A model from a user's Python file: the one place where foreign code is run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from planish.errors import PlanishError
from planish.models.preprocessing import Preprocessing, preprocessing_from


def split_file_name(name: str) -> tuple[Path, str] | None:
    """``("path/file.py", "function")`` of ``"path/file.py:function"``; ``None`` when the name is no Python file.

    Raises:
        PlanishError: when the function is not named.
    """
    match = re.fullmatch(r"(.+\.py)(?::(\w*))?", name)
    if match is None:
        return None
    if not match[2]:
        raise PlanishError(f"{name}: name the function that builds the model, as in {match[1]}:build")
    return Path(match[1]).expanduser(), match[2]


def build_from_file(path: Path, function: str) -> nn.Module:
    """Import ``path`` and call ``function()``; files beside it can be imported meanwhile.

    Raises:
        PlanishError: when the file or the function is missing, raises, or returns no ``nn.Module``.
    """
    if not path.is_file():
        raise PlanishError(f"the model file {path} does not exist")
    module_name = f"planish_model_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PlanishError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up here
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        build: Any = getattr(module, function, None)
        if not callable(build):
            raise PlanishError(f"{path} has no function {function!r}: expected one that returns the model")
        model = build()
    except PlanishError:
        raise
    except Exception as error:
        raise PlanishError(f"{path}:{function} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not isinstance(model, nn.Module):
        raise PlanishError(f"{path}:{function} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def foreign_preprocessing(model: nn.Module) -> Preprocessing:
    """The model's attribute ``planish_preprocessing`` (a :class:`Preprocessing` or a dict), else ImageNet's at 224."""
    own: Any = getattr(model, "planish_preprocessing", None)
    if own is None:
        return Preprocessing()
    if isinstance(own, Preprocessing):
        return own
    if isinstance(own, dict):
        return preprocessing_from(own)
    raise PlanishError(f"planish_preprocessing is a {type(own).__name__}, expected planish's Preprocessing or a dict")
