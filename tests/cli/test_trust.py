"""Python code is run when the user names it, and not when a file does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import planish as package
from planish.errors import PlanishError

RUN = ["--arms", "given", "--methods", "rtn", "--schemes", "w4a4"]
REFUSED = "allow it with --trust if you trust that file"


@pytest.fixture(scope="module")
def made(options, shared, tmp_path_factory):
    """A run, finished and interrupted, and a quantized file, whose network a Python file builds that tells of it."""
    from planish.cli.main import main

    place = tmp_path_factory.mktemp("trust")
    code = (shared / "tiny.py").read_text() + f"\nopen({str(place / 'told')!r}, 'a').write('x')\n"
    (place / "code.py").write_text(code)
    name = f"{place / 'code.py'}:build"
    rest = options[2:]
    assert main(["run", "--model", name, *rest, *RUN, "--out", str(place / "run")]) == 0
    shutil.copytree(place / "run", place / ".left.partial")
    assert main(["quantize", "--model", name, *rest, "--out", str(place / "q.safetensors")]) == 0
    (place / "told").unlink()
    return place, name, rest


@pytest.fixture
def place(made, monkeypatch):
    (made[0] / "told").unlink(missing_ok=True)
    monkeypatch.chdir(made[0])
    return made[0]


COMMANDS = {
    "resume": ["run", "--resume", "--out", "left"],
    "diagnose": ["diagnose", "run"],
    "evaluate": ["evaluate", "q.safetensors"],
    "export": ["export", "q.safetensors", "--out", "q.onnx"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_file_names_is_not_run(planish, place, made, command):
    data = made[2] if command == "evaluate" else []
    ended = planish(*COMMANDS[command], *data)
    assert ended.status == 2
    assert "code.py" in ended.err
    assert "--trust" in ended.err
    assert ended.err.count("\n") == 1
    assert not (place / "told").exists()


def test_it_is_run_with_trust_or_when_it_is_named_again(planish, place, made):
    left = place / ".left.partial"
    shutil.copytree(left, place / ".again.partial")
    ended = planish("run", "--resume", "--out", "left", "--trust")
    assert ended.status == 0, ended.err
    assert (place / "told").exists()
    (place / "told").unlink()
    ended = planish("run", "--resume", "--out", "again", "--model", made[1])
    assert ended.status == 0, ended.err
    assert (place / "told").exists()
    shutil.copytree(place / "left", left)
    shutil.rmtree(place / "left")


def test_another_name_is_no_request_for_this_file(planish, place, shared):
    ended = planish("run", "--resume", "--out", "left", "--model", f"{shared / 'tiny.py'}:build")
    assert ended.status == 2
    assert REFUSED in ended.err
    assert not (place / "told").exists()


def test_train_starts_only_from_a_file_of_the_network_that_is_named(planish, place, made, shared):
    ended = planish("train", "--model", f"{shared / 'tiny.py'}:build", *made[2], "--start", "q.safetensors")
    assert ended.status == 2
    assert "the given network is" in ended.err
    assert not (place / "told").exists()


def test_from_python(place, made):
    with pytest.raises(PlanishError, match="trust=True"):
        package.load(place / "q.safetensors")
    with pytest.raises(PlanishError, match="trust=True"):
        package.load_model(made[1])
    assert not (place / "told").exists()
    package.load(place / "q.safetensors", trust=True)
    assert Path(place / "told").exists()
