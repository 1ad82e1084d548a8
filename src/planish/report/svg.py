"""What all charts share: colours, matplotlib's settings, and the way from a figure to an ``<svg>`` of the page.

The SVG keeps its text as text, takes the colours from the page around it (``currentColor`` and the CSS variables
``--arm-0`` ..., ``--heat-0`` ..., with a fallback for each) and refers to nothing outside. The same figure gives the
same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from planish.report.summary import ARMS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

# Told apart with any colour vision by hue, lightness and marker; at least 3:1 against the page in either theme.
LIGHT = ("#5f6673", "#a5478a", "#0072b2", "#00805c", "#c84f00", "#806000", "#3f51b5", "#8c3b3b")
DARK = ("#a3aab8", "#e08cc4", "#56b4e9", "#2fbf95", "#ff8546", "#e0b400", "#9fa8ff", "#e39a9a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
# From low to high: away from the page's own colour, evenly in lightness.
HEAT_LIGHT = (
    "#f1eef6", "#dfe0ee", "#c9d2e5", "#aec4db", "#90b4d0", "#70a1c2", "#528cb1", "#3a759d", "#275d85", "#17456a",
)  # fmt: skip
HEAT_DARK = (
    "#1b2129", "#1f2d3c", "#233b51", "#284b68", "#2f5d80", "#3a7199", "#4c87b0", "#689fc4", "#8db8d6", "#b9d4e7",
)  # fmt: skip
LEGEND = 54  # characters that fit beside each other
ROW = 17  # height of a row of them
# Stand-ins that matplotlib writes and that are replaced by what CSS decides.
TEXT, LINE, PAGE = "#010203", "#040506", "#070809"
_TEXTS = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
_LINES = ("axes.edgecolor", "grid.color")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "planish",
    "font.size": 12,
    "axes.titlesize": 12,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.usetex": False,
    "text.parse_math": False,
}


def colour_index(arm: str, arms: Sequence[str]) -> int:
    """Which colour and marker an arm has: the usual arms always the same, others in turn what is left."""
    if arm in ARMS:
        return ARMS.index(arm)
    others = [name for name in arms if name not in ARMS]
    free = [*range(len(ARMS), len(LIGHT)), *(i for i, usual in enumerate(ARMS) if usual not in arms)]
    return free[others.index(arm) % len(free)]


@contextmanager
def canvas(width: float = 400, height: float = 270, *, apart: bool = False) -> Iterator[Figure]:
    """A figure of this size in units of the SVG; draw it and call :func:`inline` while this is open.

    ``apart`` keeps several axes at a distance, so that their labels do not touch.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(style(TEXT, LINE)):
        layout = ConstrainedLayoutEngine(w_pad=0.09, wspace=0.04) if apart else ConstrainedLayoutEngine()
        yield Figure(figsize=(width / 72, height / 72), layout=layout)


def style(text: str, line: str) -> Any:
    """All of matplotlib's settings, so that a user's own style file does not change a report."""
    import matplotlib as mpl

    settings: dict[str, Any] = dict(mpl.rcParamsDefault.items())
    settings.pop("backend", None)  # the figures name their format; the user's choice of windows stays
    settings.update(_STYLE, **dict.fromkeys(_TEXTS, text), **dict.fromkeys(_LINES, line))
    return settings


def legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """A legend above the axes, in as many rows as the names need; beyond two the figure grows by them."""
    if not handles:
        return
    labels = [label(name, 40) for name in names]
    columns = next((n for n in range(len(labels), 1, -1) if _width(labels, n) <= LEGEND), 1)
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + max(0, rows - 2) * ROW / 72)
    order = [i for column in range(columns) for i in range(column, len(labels), columns)]  # read along the rows
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        columnspacing=1.1,
        handlelength=1.6,
        handletextpad=0.5,
    )


def _width(labels: Sequence[str], columns: int) -> int:
    """About how many characters a legend of so many columns is wide, a line or marker counting as five."""
    return sum(max(len(text) + 5 for text in labels[column::columns]) for column in range(columns))


def label(name: str, length: int = 24) -> str:
    """A user's name as a label: printable, of bounded length, and not hidden by matplotlib's leading underscore."""
    text = "".join(char if char.isprintable() else "?" for char in name)
    if len(text) > length:  # beginnings tell runs and networks apart, ends their arms
        text = f"{text[: length // 2]}\N{HORIZONTAL ELLIPSIS}{text[1 + length // 2 - length :]}"
    return "\N{ZERO WIDTH SPACE}" + text if text.startswith("_") else text


def inline(figure: Figure, prefix: str, alt: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure as an element of a page: no prologue, ids of its own, colours from CSS, words for it.

    Args:
        prefix: begins every id, so that two charts do not share one.
        alt: the chart in words.
        titles: for labels that were shortened, the whole name, shown when the pointer rests on them.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = svg[svg.index(">") + 1 :]
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)  # a hundredth is seen by nobody
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = svg.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the family comes from the page
    svg = svg.replace(TEXT, "currentColor").replace(LINE, f"var(--line, {LINE})").replace(PAGE, f"var(--page, {PAGE})")
    for name, colours in (("arm", LIGHT), ("heat", HEAT_LIGHT)):
        for index, colour in enumerate(colours):
            svg = svg.replace(colour, f"var(--{name}-{index}, {colour})")
    for shown, whole in (titles or {}).items():
        svg = svg.replace(
            f">{escape(shown, quote=False)}</text>", f">{escape(shown)}<title>{escape(whole)}</title></text>"
        )
    head = f'<svg {view[0]} role="img" aria-label="{escape(alt)}">'
    return head + re.sub(r"\n\s*\n+", "\n", svg)
