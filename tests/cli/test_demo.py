"""`planish demo` as a user starts and ends it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.deploy.tiny_onnx import save_tiny, tiny_card

pytest.importorskip("uvicorn", reason="needs planish[demo]")
pytest.importorskip("starlette", reason="needs planish[demo]")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save_tiny(tmp_path / "m.onnx").name


def test_it_serves_and_ends_quietly_on_a_signal(model, tmp_path):
    from tests.deploy.serving import ask

    save_tiny(tmp_path / "f.onnx", tiny_card(scheme="float"))
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from planish.cli.main import entry\n"
    program += "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); entry()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "demo", model, "--against", "f.onnx", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ asks f\.onnx and m\.onnx; Ctrl-C ends it\n", line)[1])
        page = ask(port, "GET", "/").body.decode()
        assert page.index(">float<") < page.index(">w4a4<")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (0, "\n", "False\n")


def test_a_port_that_is_taken(planish, model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ended = planish("demo", model, "--port", other.getsockname()[1])
    assert (ended.status, ended.out) == (2, "")
    assert "is taken by another program" in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m.onnx", "--port", "70000"], "port is 70000"),
        (["m.onnx", "--threads", "0"], "--threads is 0"),
        (["gone.onnx", "--port", "0"], "gone.onnx does not exist"),
        (["m.onnx", "--port", "0", "--against", "gone.onnx"], "gone.onnx does not exist"),
    ],
)
def test_arguments_that_make_no_sense(planish, model, arguments, words):
    ended = planish("demo", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err
    assert ended.err.count("\n") == 1


def test_without_the_server_it_says_what_to_install(planish, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "planish.deploy.demo", raising=False)
    monkeypatch.delattr("planish.deploy.demo", raising=False)
    ended = planish("demo", model)
    assert ended.status == 2
    assert "uvicorn, which is not installed: pip install planish[demo]" in ended.err
