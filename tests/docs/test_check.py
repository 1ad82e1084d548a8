"""The look over a built site finds what it is made to find."""

import pytest
from planish_docs.check import complaints

GOOD = '<html><head><link href="s.css"></head><body id="top"><a href="b.html#x">b</a><img src="data:,"></body></html>'
OTHER = '<html><body><h1 id="x">b</h1><a href="index.html#top">a</a><a href="https://example.org">out</a></body></html>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "b.html").write_text(OTHER)
    (tmp_path / "s.css").write_text("a { color: red }")
    return tmp_path


def test_a_good_site(site):
    assert complaints(site) == []


@pytest.mark.parametrize(
    ("tag", "fault"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="//fonts.example.org/a.css">', "loads //fonts.example.org/a.css"),
        ('<img src="http://example.org/a.png">', "loads http://example.org/a.png"),
        ('<a href="gone.html">gone</a>', "nothing at gone.html"),
        ('<a href="b.html#gone">gone</a>', "nothing at b.html#gone"),
        ('<img src="gone.png">', "nothing at gone.png"),
    ],
)
def test_a_fault(site, tag, fault):
    (site / "c.html").write_text(f"<html><body>{tag}</body></html>")
    (found,) = complaints(site)
    assert fault in found


def test_style_sheets_and_an_empty_folder(site, tmp_path_factory):
    (site / "s.css").write_text('@font-face { src: url("https://fonts.example.org/f.woff2") }')
    assert complaints(site) == ["s.css loads from another host"]
    assert "there is no page" in complaints(tmp_path_factory.mktemp("empty"))[0]
