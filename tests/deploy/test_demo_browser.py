"""The demo's page in a real browser, where there is one: pictures in, answers out, nothing on the console."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.browser import BROWSER, Browser
from tests.deploy.tiny_onnx import save_tiny, tiny_card, weights

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

ANSWERED = "document.querySelectorAll('#models li').length === 6"
LONG = "a label that is rather long: Weimaraner-Hündin_im_Sprung_" + "x" * 60


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from planish.deploy.classify import Classifier
    from planish.deploy.demo import make_app
    from tests.deploy.serving import serving

    folder = tmp_path_factory.mktemp("models")
    classes = ("dark", "light", LONG)
    floating = save_tiny(folder / "a-file-with-a-long-name-float.onnx", tiny_card(classes=classes, scheme="float"))
    low = save_tiny(folder / "m-w4a4.onnx", tiny_card(classes=classes), weight=0.1 * weights(tiny_card()))
    with serving(make_app([Classifier(floating), Classifier(low)])) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def light(tmp_path):
    Image.fromarray(np.full((40, 300), 255, np.uint8)).save(tmp_path / "light.png")
    return tmp_path / "light.png"


def drop(browser, content: bytes, name: str) -> None:
    data = base64.b64encode(content).decode()
    browser.eval(f"""(() => {{
        const bytes = Uint8Array.from(atob("{data}"), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "{name}"));
        const options = {{dataTransfer: transfer, bubbles: true, cancelable: true}};
        return document.querySelector("#drop").dispatchEvent(new DragEvent("drop", options));
    }})()""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_chosen_picture_is_answered_by_both(browser, page, light, width, scheme):
    browser.go(page, width=width, scheme=scheme)
    assert browser.eval("document.documentElement.scrollWidth") == width
    browser.choose("#file", light)
    browser.wait(ANSWERED)
    assert browser.eval("document.querySelector('#outcome').textContent") == "Both say light."
    headings = browser.eval("[...document.querySelectorAll('#models h2')].map(h => h.textContent)")
    assert headings == ["float", "w4a4"]
    first = browser.eval("[...document.querySelectorAll('#models li:first-child')].map(e => e.innerText)")
    assert [text.split()[0] for text in first] == ["light", "light"]
    assert "86.7" in first[0]
    times = browser.eval("[...document.querySelectorAll('.time')].map(e => e.textContent)")
    assert all(text.endswith(" ms") for text in times)
    sides = browser.eval("[...document.querySelectorAll('#models section')].map(e => e.getBoundingClientRect().top)")
    assert sides[0] == sides[1]
    browser.wait("document.querySelector('#picture').naturalWidth === 300")
    assert browser.eval("document.querySelector('#picture').alt") == "The picture light.png"
    assert browser.eval("document.documentElement.scrollWidth") == width
    assert browser.complaints() == []
    assert [a for a in browser.requested() if not a.startswith((page, f"blob:{page}", "data:,"))] == []
    browser.picture(light.parent / f"{scheme}-{width}.png")
    corner = Image.open(light.parent / f"{scheme}-{width}.png").convert("L").getpixel((2, 2))
    assert corner > 240 if scheme == "light" else corner < 40


def test_a_dropped_picture_replaces_the_one_before(browser, page, light):
    browser.go(page)
    browser.choose("#file", light)
    browser.wait(ANSWERED)
    dark = io.BytesIO()
    Image.new("L", (28, 28)).save(dark, "PNG")
    drop(browser, dark.getvalue(), "dark.png")
    browser.wait("document.querySelector('#outcome').textContent === 'Both say dark.'")
    browser.wait("document.querySelector('#picture').naturalWidth === 28")
    assert browser.complaints() == []


def test_what_is_no_picture_gets_a_sentence_and_the_old_answers_go(browser, page, light):
    browser.go(page)
    browser.choose("#file", light)
    browser.wait(ANSWERED)
    drop(browser, b"no picture", "notes.txt")
    browser.wait("document.querySelector('#error').textContent === 'the file is not an image that can be read'")
    assert browser.eval("document.querySelectorAll('#models li').length") == 0
    assert browser.eval("document.querySelector('#outcome').textContent").startswith("Give a picture")
    browser.eval("document.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), cancelable: true}))")
    assert "That was no file" in browser.eval("document.querySelector('#error').textContent")


def test_a_file_that_is_too_large_is_not_sent(browser, page, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(10_000_001))
    browser.go(page)
    browser.choose("#file", tmp_path / "large.png")
    browser.wait("document.querySelector('#error').textContent.includes('at most 10 MB')")
    assert not any(address.endswith("/classify") for address in browser.requested())


def test_a_page_that_sends_too_much_can_read_the_answer(browser, page):
    browser.go(page)
    sent = "fetch('/classify', {method: 'POST', body: new Blob([new Uint8Array(30e6)])}).then((reply) => reply.json())"
    assert browser.eval(sent) == {"error": "the file is larger than 10 MB: give a smaller one"}


def test_the_keyboard_reaches_the_file_dialog_and_shows_where_it_is(browser, page):
    browser.go(page)
    browser.press("Tab", 9)
    assert browser.eval("document.activeElement.id") == "file"
    assert browser.eval("getComputedStyle(document.querySelector('#drop')).outlineStyle") == "solid"
    labelled = browser.eval("document.querySelector('#file').labels[0].textContent.trim()")
    assert labelled.startswith("Choose a picture")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_can_be_read(browser, page, scheme):
    browser.go(page, scheme=scheme)
    names = ("page", "ink", "soft", "link", "bad")
    colours = {
        name: browser.eval(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        for name in names
    }
    for name in names[1:]:
        assert contrast(colours["page"], colours[name]) >= 4.5, name


def contrast(first: str, second: str) -> float:
    """The contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
