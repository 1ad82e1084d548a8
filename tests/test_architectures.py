"""The page of architectures says what its CSV and the tests say."""

import csv
import importlib.util
from pathlib import Path

from tests.families import FAMILIES
from tests.test_families import FAILING, QUICK

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
CSV = ROOT / "benchmarks" / "architectures.csv"


def script():
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_page_is_that_of_the_csv():
    with CSV.open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["network"] for row in rows}) == len(rows) >= 40
    shown = PAGE.partition("--table -->\n")[2].partition("\n<!-- end")[0]
    assert shown == script().table(rows)


def test_the_page_names_every_failure_and_counts_right():
    failures = PAGE.partition("These do not pass:")[2].partition("These pass")[0]
    listed = {line.split("|")[1].strip() for line in failures.splitlines() if line.startswith("|")}
    assert listed - {"family", "---"} == set(FAILING)
    families = {name.partition("-")[0] for name in FAMILIES}
    assert f"{len(families)}, in {len(FAMILIES)} entries" in PAGE
    assert f"runs {len({name.partition('-')[0] for name in QUICK})} families" in PAGE
