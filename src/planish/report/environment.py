"""What a number depends on besides the method: the software, the machine, the protocol."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.report.plain import as_text, flatten_keys

if TYPE_CHECKING:
    import torch
    from rich.console import Console


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """The software versions and the machine, as a flat dict of printable values; no host or user names.

    ``device`` is the one that was used; None means CUDA if there is any, else the CPU.
    """
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, Any] = {
        "planish": _version("planish", missing="from source"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "device": str(where),
    }
    if where.type == "cuda" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(where)
        found["cuda"] = torch.version.cuda
    return found | {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "os": _os_name()}


def peak_memory_mb(device: str | torch.device | None = None) -> float | None:
    """The most memory in use so far, in 10^6 bytes; None where the system does not say.

    On CUDA: of PyTorch's allocator since the last ``reset_peak_memory_stats``. Else: of this process since it began.
    """
    import torch

    if device is not None and torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts in bytes, Linux in KiB


def protocol_card(protocol: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the protocol card: one line a setting, values that are None left out."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    entries = [(key.replace("_", " "), as_text(value)) for key, value in flatten_keys(protocol).items()]
    entries = [(key, text) for key, text in entries if text]
    if not console.is_terminal:
        width = max((len(key) for key, _ in entries), default=0)
        for key, text in entries:
            console.out(f"{key:<{width}}  {text}", highlight=False)
        return
    grid = Table.grid(padding=(0, 2))
    for key, text in entries:  # Text, not str: a name in brackets is no markup
        grid.add_row(Text(key, style="dim"), Text(text))
    console.print(Panel(grid, title="protocol", title_align="left", expand=False))


def _version(package: str, missing: str = "not installed") -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return missing


def _cpu_name() -> str:
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']} ({platform.system()} {platform.machine()})"
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()} ({platform.machine()})"
