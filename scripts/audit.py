"""Ask a public service for advisories about the installed packages (pip-audit): `make audit`.

Exits with 1 for an advisory that .ci/audit-ignore.txt does not acknowledge with a reason. Where the service cannot be
reached, or knows none of the packages, it says that nothing was audited and exits with 0: a machine without a network
is no fault of the packages.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IGNORED = Path(__file__).parents[1] / ".ci" / "audit-ignore.txt"
COMMAND = ["-m", "pip_audit", "--local", "--skip-editable", "--format", "json", "--progress-spinner", "off",
           "--timeout", "15"]  # fmt: skip
NOTHING = "nothing was audited"


def read_ignored(text: str) -> dict[str, str]:
    """Identifier -> reason. Raises ValueError for a line without a reason."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, _, reason = line.strip().partition(" ")
            if not reason.strip():
                raise ValueError(f"{IGNORED.name}, line {number}: {name} has no reason: write it after the identifier")
            found[name] = reason.strip()
    return found


def judge(report: Mapping[str, Any], ignored: Mapping[str, str]) -> tuple[int, list[str]]:
    """The exit status and what to say of pip-audit's report in JSON."""
    packages = report["dependencies"]
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return 0, [f"the service knows none of {len(packages)} packages, so {NOTHING}"]
    lines, bad = [], 0
    for package in audited:
        for advisory in package["vulns"]:
            names = [advisory["id"], *advisory.get("aliases", [])]
            reason = next((ignored[name] for name in names if name in ignored), None)
            bad += reason is None
            fixed = ", ".join(advisory.get("fix_versions", [])) or "no version"
            state = f"mended in {fixed}" if reason is None else f"acknowledged: {reason}"
            lines.append(f"{package['name']} {package['version']}: {names[0]}, {state}")
    lines.append(
        f"{len(audited)} of {len(packages)} packages audited, {bad} advisories not acknowledged"
        + (f" (raise the version, or give a reason in {IGNORED.name})" if bad else "")
    )
    return int(bad > 0), lines


def main() -> int:
    """Run pip-audit, print what it found, and give the exit status."""
    ignored = read_ignored(IGNORED.read_text(encoding="utf-8"))
    if importlib.util.find_spec("pip_audit") is None:
        print(f"audit: pip-audit is not installed (it is in the extra dev), so {NOTHING}")
        return 0
    try:
        done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, timeout=180)
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # of what went wrong it prints a traceback and no JSON
        print(f"audit: the service for advisories could not be reached, so {NOTHING}")
        return 0
    status, lines = judge(report, ignored)
    print("\n".join(f"audit: {line}" for line in lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
