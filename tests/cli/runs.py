"""What of a finished run must not depend on how often it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from planish.deploy.packed.container import CHECKSUM

CLOCK = ("seconds", "seconds_training", "peak_memory_mb")


def without_clock(value: Any) -> Any:
    """The same without what a clock or the memory of the process has measured."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def weights(path: Path) -> tuple[dict[str, bytes], Any]:
    """Every tensor's bytes, and the metadata."""
    with safe_open(path, framework="np") as file:
        head = {key: value for key, value in (file.metadata() or {}).items() if key != CHECKSUM}
        head = {key: json.loads(value) if value.startswith("{") else value for key, value in head.items()}
        names = list(file.keys())
        return {name: file.get_tensor(name).tobytes() for name in names}, without_clock(head)


def events(folder: Path) -> dict[tuple, set[str]]:
    """What the log says of each moment; a moment that came again must not have been another one."""
    found: dict[tuple, set[str]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = without_clock(json.loads(line))
        names = ("arm", "scheme", "method", "event", "step", "epoch", "pass", "unit")
        key = tuple(event.pop(name, None) for name in names)
        if "estimate" not in key:  # of seconds
            found.setdefault(key, set()).add(json.dumps(event, sort_keys=True))
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """Results, weights, log and the names of all files."""
    return {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        "results": without_clock(json.loads((folder / "results.json").read_text())),
        "weights": {path.name: weights(path) for path in folder.glob("*.safetensors")},
        "log": events(folder),
    }
