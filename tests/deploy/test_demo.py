"""The demo over HTTP, on a real server: answers, refusals, limits, and headers that let a page do little."""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import re
import threading

import pytest

pytest.importorskip("uvicorn", reason="needs planish[demo]")
pytest.importorskip("starlette", reason="needs planish[demo]")

from planish.deploy import demo
from planish.deploy.classify import Classifier
from planish.errors import PlanishError
from planish.preprocessing import Preprocessing
from tests.deploy.serving import ask, serving
from tests.deploy.test_comparison import png
from tests.deploy.tiny_onnx import save_tiny, tiny_card

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    paths = [save_tiny(folder / f"{name}.onnx", tiny_card(scheme=name, name=EVIL)) for name in ("float", "w4a4")]
    return demo.make_app([Classifier(path) for path in paths])


@pytest.fixture(scope="module")
def port(app):
    with serving(app) as port:
        yield port


def test_the_page_names_both_models_and_escapes_what_they_say(port):
    reply = ask(port, "GET", "/")
    page = reply.body.decode()
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "float.onnx" in page
    assert "w4a4.onnx" in page
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:,)", page)


def test_a_picture_is_answered(port):
    reply = ask(port, "POST", "/classify", png(), Origin=f"http://127.0.0.1:{port}")
    assert reply.status == 200
    assert reply.json["outcome"] == "Both say light."
    assert [model["top"][0]["label"] for model in reply.json["models"]] == ["light", "light"]


def test_every_answer_carries_the_headers(port):
    for reply in (ask(port, "GET", "/"), ask(port, "GET", "/absent"), ask(port, "GET", "/", Host="evil.example")):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["server"] is None
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_the_policy_holds_the_hash_of_style_and_script(port):
    reply = ask(port, "GET", "/")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", reply.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost:x"])
def test_a_foreign_name_is_refused(port, host):
    for method, path in (("GET", "/"), ("POST", "/classify")):
        reply = ask(port, method, path, png() if method == "POST" else None, Host=host)
        assert (reply.status, list(reply.json)) == (403, ["error"])


def test_this_machines_names_are_taken(port):
    for host in ("127.0.0.1", "localhost", f"localhost:{port}"):
        assert ask(port, "GET", "/", Host=host).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:1", "http://localhost:1"])
def test_a_page_from_elsewhere_is_refused(port, origin):
    assert ask(port, "POST", "/classify", png(), Origin=origin).status == 403


@pytest.mark.parametrize(
    ("body", "words"), [(b"", "no picture was sent"), (b"text", "not an image"), (png()[:45], "cannot be read")]
)
def test_bad_pictures_get_400_and_a_sentence(port, body, words):
    reply = ask(port, "POST", "/classify", body)
    assert reply.status == 400
    assert words in reply.json["error"]


def test_a_body_that_is_too_large_gets_413_however_it_comes(port, monkeypatch):
    monkeypatch.setattr(demo, "MAX_BYTES", 1000)
    exactly = png() + bytes(1000 - len(png()))
    assert ask(port, "POST", "/classify", exactly).status == 200
    for body in (exactly + b"x", iter([bytes(600)] * 2), iter([bytes(1 << 16)] * 500)):  # an iterator comes in chunks
        reply = ask(port, "POST", "/classify", body)
        assert (reply.status, reply.json["error"]) == (413, "the file is larger than 1 kB: give a smaller one")


def test_other_addresses_and_methods(port):
    for method, path, status in (
        ("GET", "/absent", 404), ("GET", "/classify", 405), ("OPTIONS", "/classify", 405), ("POST", "/", 405),
        ("GET", "/../pyproject.toml", 404),
    ):  # fmt: skip
        reply = ask(port, method, path)
        assert (reply.status, list(reply.json)) == (status, ["error"])


def test_one_at_a_time_and_a_line_that_ends(port, monkeypatch):
    working, most, gate = [0], [0], threading.Event()

    def slow(classifiers, data):
        working[0] += 1
        most[0] = max(most[0], working[0])
        gate.wait(10)
        working[0] -= 1
        return {}

    monkeypatch.setattr(demo, "compare", slow)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(ask, port, "POST", "/classify", png()) for _ in range(12)]
        refused = [job.result().status for _, job in zip(range(4), concurrent.futures.as_completed(jobs), strict=False)]
        gate.set()
        statuses = sorted(job.result().status for job in jobs)
    assert refused == [503] * 4
    assert statuses == [200] * demo.WAITING + [503] * 4
    assert most == [1]


def test_a_model_that_fails_is_an_error_of_the_server(port, monkeypatch):
    def fail(*arguments):
        raise PlanishError("m.onnx: the model fails")

    monkeypatch.setattr(demo, "compare", fail)
    reply = ask(port, "POST", "/classify", png())
    assert (reply.status, reply.json) == (500, {"error": "m.onnx: the model fails"})


def test_ports():
    with demo.listen(0) as bound:
        host, port = bound.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(PlanishError, match=f"port {port} of 127.0.0.1 is taken by another program"):
            demo.listen(port)
    for wrong in (-1, 65536):
        with pytest.raises(PlanishError, match=f"port is {wrong}"):
            demo.listen(wrong)


def test_models_of_other_classes_or_sizes(tmp_path):
    first = Classifier(save_tiny(tmp_path / "a.onnx"))
    other = Classifier(save_tiny(tmp_path / "b.onnx", tiny_card(classes=("a", "b", "c"))))
    with pytest.raises(PlanishError, match="other classes"):
        demo.make_app([first, other])
    colour = Preprocessing((3, 12, 10), (0.5,) * 3, (0.25,) * 3, crop_pct=0.9)
    larger = Classifier(save_tiny(tmp_path / "c.onnx", tiny_card(preprocessing=colour)))
    with serving(demo.make_app([first, larger])) as port:
        assert ask(port, "POST", "/classify", png()).json["outcome"] == "Both say light."
