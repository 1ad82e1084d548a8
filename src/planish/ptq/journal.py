"""What a long quantization has done so far, in files, so that an interrupted one goes on where it was.

A pass that learns for a long time puts down what came of each part as soon as it is done. A quantization that is begun
again runs its passes from the first on, which is exact and mostly quick, and takes from the journal what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from planish.errors import NotWritten, PlanishError, why_not_written
from planish.models.weights import check_own, save_weights, write_whole

_SETTINGS = "settings.json"


class Journal:
    """Parts of a quantization that are done, by name: a safetensors file each, moved into place when complete.

    Of several processes the main one writes, and all read the same.

    Args:
        folder: where the files are; ``None``: nothing is kept and nothing is found.
        resume: take what is there; otherwise it is deleted.
        settings: plain values on which the result depends; a journal with other ones is refused.

    Raises:
        PlanishError: what is there belongs to another quantization, or to none.
    """

    def __init__(
        self, folder: Path | None = None, *, resume: bool = False, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.settings = folder, json.dumps(settings or {}, sort_keys=True)
        self.found: set[str] = set()
        if folder is None:
            return
        answer: list[Any] = [None, None]
        if PartialState().is_main_process:
            try:
                answer[0] = self._look(folder, resume)
            except PlanishError as error:
                answer[1] = str(error)
        if PartialState().num_processes > 1:  # all go on from the same place, or none does
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise PlanishError(answer[1])
        self.found = set(answer[0])

    def _look(self, folder: Path, resume: bool) -> list[str]:
        known = folder / _SETTINGS
        check_own(folder, _SETTINGS, *(["*.safetensors"] if known.is_file() else []))
        if not known.is_file():
            return []
        parts = list(folder.glob("*.safetensors"))
        if not resume:
            for path in (known, *parts):
                path.unlink()
            return []
        if known.read_text() != self.settings:
            raise PlanishError(
                f"{folder} holds a part of another quantization (another network, other images, settings or threads): "
                f"give the same ones to continue it, or delete it to start over"
            )
        return [path.stem for path in parts]

    def get(self, name: str) -> dict[str, Tensor] | None:
        """What was put down under a name before the interruption; ``None`` if nothing was.

        Raises:
            PlanishError: the file is damaged.
        """
        if self.folder is None or name not in self.found:
            return None
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise PlanishError(f"{path} cannot be read ({error}): delete it, and this part is done again") from None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep what came of a part.

        Raises:
            NotWritten: the disk is full or not writable; what was put down before is kept.
        """
        if self.folder is None or not PartialState().is_main_process:
            return
        if not (self.folder / _SETTINGS).is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise NotWritten(f"{self.folder} could not be made: {why_not_written(error)}") from None
            write_whole(self.folder / _SETTINGS, self.settings.encode())
        save_weights(tensors, self.folder / f"{name}.safetensors")


def fingerprint(scheme: str, passes: Sequence[Any], reference: Sequence[Tensor], **more: Any) -> dict[str, Any]:
    """What the result of a quantization depends on, as plain values.

    Args:
        scheme: its name.
        more: what else the result depends on, by name.
        passes: as they are applied.
        reference: logits of the float network for all calibration images, batch by batch: they stand for the network,
            the images, and the arithmetic of this machine.
    """
    digest = hashlib.sha256()
    for logits in reference:
        digest.update(logits.contiguous().numpy().tobytes())
    described = [[getattr(step, "name", ""), _described(step)] for step in passes]
    return {"scheme": scheme, "passes": described, "float": digest.hexdigest(), **_described(more)}


def _described(value: Any) -> Any:
    """A pass or an option as plain values; of what is none (a loader of images) only the class is told.

    ``memory`` is left out, which changes where caches lie and no result.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _described(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_described(one) for one in value]
    own = {item.name: getattr(value, item.name) for item in fields(value)} if is_dataclass(value) else {}
    return [type(value).__name__, {name: _described(one) for name, one in own.items() if name != "memory"}]
