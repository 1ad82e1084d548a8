"""The audit of dependencies: what is acknowledged, what is not, and what it says when it could not look."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "scripts" / "audit.py"


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("planish_audit", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOUND = {"id": "PYSEC-1", "aliases": ["CVE-1", "GHSA-1"], "fix_versions": ["2.1"]}


def report(*vulns):
    clean = {"name": "numpy", "version": "2.0", "vulns": []}
    skipped = {"name": "torch", "skip_reason": "not found"}
    return {"dependencies": [{"name": "pillow", "version": "2.0", "vulns": list(vulns)}, clean, skipped], "fixes": []}


def test_an_advisory_fails_until_it_is_acknowledged_by_any_of_its_names(audit):
    status, lines = audit.judge(report(FOUND), {})
    assert status == 1
    assert lines[0] == "pillow 2.0: PYSEC-1, mended in 2.1"
    assert lines[-1].startswith("2 of 3 packages audited, 1 advisories not acknowledged")
    for name in ("PYSEC-1", "CVE-1", "GHSA-1"):
        status, lines = audit.judge(report(FOUND), {name: "only writes are concerned"})
        assert status == 0
        assert "acknowledged: only writes are concerned" in lines[0]
    assert audit.judge(report(FOUND, {"id": "PYSEC-2"}), {"CVE-1": "x"})[0] == 1
    assert audit.judge(report(), {})[0] == 0


def test_a_service_that_knows_nothing_is_told(audit):
    skipped = {"dependencies": [{"name": "torch", "skip_reason": "not found"}]}
    assert audit.judge(skipped, {}) == (0, ["the service knows none of 1 packages, so nothing was audited"])


@pytest.mark.parametrize("out", ["", "Traceback ..."])
def test_a_service_that_is_not_reached_is_told(audit, monkeypatch, capsys, out):
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, out, ""))
    assert audit.main() == 0
    assert "could not be reached, so nothing was audited" in capsys.readouterr().out
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.main() == 0
    assert "pip-audit is not installed" in capsys.readouterr().out


def test_every_exception_has_a_reason(audit):
    assert audit.read_ignored("# x\n\nCVE-1  because of this\n") == {"CVE-1": "because of this"}
    with pytest.raises(ValueError, match="line 2: CVE-2 has no reason"):
        audit.read_ignored("CVE-1 x\nCVE-2\n")
    audit.read_ignored(audit.IGNORED.read_text())
