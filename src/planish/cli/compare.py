"""``planish compare``."""

from __future__ import annotations

from planish.cli.files import check_file
from planish.cli.options import Compare
from planish.report.compare import Comparison, compare, read_runs
from planish.report.html import write_report
from planish.report.summary import outcome, summarize
from planish.report.table import print_table


def execute(command: Compare) -> None:
    """Print the table of all runs and what differs between them; with --out write it as a page."""
    if command.out:
        check_file(command.out, command.overwrite)
    found = compare(read_runs(command.runs))
    for line in _differences(found):
        print(line)
    print_table(found.rows)
    print()
    print(" ".join(filter(None, [outcome(summarize(found.rows)), found.caution])))
    for sentence in found.notes:
        print(sentence)
    if command.out:
        print(f"page: {write_report(found.as_results(), command.out)}")


def _differences(found: Comparison) -> list[str]:
    """A line for each setting that differs, a column for each run; nothing if none does."""
    if not found.differences:
        return []
    grid = [["differs", *(run.name for run in found.runs)]]
    grid += [[key, *(text or "-" for text in texts)] for key, texts in found.differences.items()]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in grid] + [
        ""
    ]
