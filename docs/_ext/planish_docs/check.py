"""Look over a built site: nothing may come from another host, and every link inside it must lead somewhere.

python -m planish_docs.check build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "use": "href"}


class Page(HTMLParser):
    """What a page loads, where it links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        loaded = values.get(_LOADED.get(tag, ""))
        if loaded:
            self.loads.append(loaded)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")
        self.anchors |= {values[key] or "" for key in ("id", "name") if values.get(key)}


def complaints(site: Path) -> list[str]:
    """One sentence for each fault.

    Args:
        site: folder with the built pages.

    Returns:
        What pages or style sheets load from other hosts, and links to files or anchors that are not there.
    """
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: there is no page"]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [f"{name} loads {link}" for link in page.loads if _foreign(link)]
        found += [f"{name}: nothing at {link}" for link in [*page.loads, *page.links] if _broken(link, path, pages)]
    for style in sorted(site.rglob("*.css")):
        text = style.read_text(encoding="utf-8")
        if any(mark in text for mark in ("url(http", 'url("http', "url('http", "url(//", "@import")):
            found.append(f"{style.relative_to(site)} loads from another host")
    return found


def _foreign(link: str) -> bool:
    return urlsplit(link).scheme in ("http", "https", "ftp") or link.startswith("//")


def _broken(link: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or link.startswith("//"):
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return True
    anchor = unquote(parts.fragment)
    return bool(anchor) and target in pages and anchor not in pages[target].anchors


if __name__ == "__main__":
    faults = complaints(Path(sys.argv[1]))
    print("\n".join(faults) or f"{sys.argv[1]}: nothing from other hosts, no dead link inside")
    sys.exit(bool(faults))
