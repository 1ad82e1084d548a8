"""The results in the terminal: one line an arm, one column a scheme and method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from planish.report.summary import Summary, summarize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def results_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The rows of results.json as a rich table: top-1 in percent, the best arm of each column in bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    summary = summarize(rows)
    table = Table(box=box.SIMPLE_HEAD, caption=caption(summary), caption_justify="left", caption_style="dim")
    table.add_column("arm")
    for column in summary.columns:  # Text, not str: a name in brackets is no markup
        table.add_column(Text(str(column)), justify="right", no_wrap=True)
    for arm in summary.arms:
        cells = []
        for column in summary.columns:
            cell = summary.get(arm, column)
            style = "bold" if arm in summary.best(column) else ""
            cells.append(Text(cell.text() if cell else "-", style=style))
        table.add_row(Text(arm), *cells)
    return table


def results_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The same as plain ASCII lines; the best arm of each column has a star."""
    summary = summarize(rows)
    grid = [["arm", *map(str, summary.columns)]]
    for arm in summary.arms:
        line = [arm]
        for column in summary.columns:
            cell = summary.get(arm, column)
            line.append((cell.text("+-") if cell else "-") + ("*" if arm in summary.best(column) else " "))
        grid.append(line)
    grid = [[_ascii(text) for text in line] for line in grid]
    widths = [max(len(text) for text in texts) for texts in zip(*grid, strict=True)]
    lines = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in grid]
    lines = [[line[0].strip().ljust(widths[0]), *line[1:]] for line in lines]
    return ["  ".join(line).rstrip() for line in lines] + [_ascii(caption(summary, star=True))]


def print_table(rows: Iterable[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the table, as plain ASCII lines where there is no terminal."""
    from rich.console import Console

    console = console or Console()
    if console.is_terminal:
        console.print(results_table(rows))
        return
    for line in results_lines(rows):
        console.out(line, highlight=False)


def caption(summary: Summary, star: bool = False) -> str:
    """What the numbers of the table are."""
    text = f"Top-1 in percent; the best arm of each column {'has a star' if star else 'is bold'}."
    least, most = summary.seeds
    if most > 1:
        text += f" Mean \N{PLUS-MINUS SIGN} standard error over {most if least == most else f'up to {most}'} seeds"
        text += "." if least > 1 else "; a number alone is a single run."
    return text


def _ascii(text: str) -> str:
    return text.replace("\N{PLUS-MINUS SIGN}", "+-").encode("ascii", "backslashreplace").decode()
