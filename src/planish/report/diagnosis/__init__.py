"""From ``results["flatness"]`` to the chapters of the page: why a network breaks at low bits, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planish.report.diagnosis import curvature, damage, errors, landscape, measures, noise, prediction, split
from planish.report.diagnosis.measures import Headline
from planish.report.diagnosis.parts import Data, Networks, Picture, Section, Table, known, show
from planish.report.plain import join

__all__ = ["Data", "Picture", "Section", "Story", "Table", "tell"]

_CHAPTERS = (landscape, errors, split, curvature, noise, prediction, damage)


@dataclass(frozen=True)
class Story:
    """What a page says of a diagnosis. Whatever was not measured is empty.

    Attributes:
        outcome: the diagnosis in one sentence, for a run without rows.
        headline: the measure that is shown large.
        measures: all scalar measures side by side.
        setting: on what all this was measured.
        sections: the chapters, in the order in which they are told.
        advice: what to do next, in sentences.
    """

    outcome: str
    headline: Headline | None
    measures: Table | None
    setting: str
    sections: list[Section]
    advice: list[str]


def tell(flatness: Mapping[str, Any]) -> Story:
    """The story of ``flatness`` (of results.json, or the same with NaN in it)."""
    networks = Networks.of(flatness)
    return Story(
        _outcome(networks),
        measures.headline(networks),
        measures.table(networks),
        _setting(networks),
        [section for chapter in _CHAPTERS if (section := chapter.section(networks))],
        _advice(networks),
    )


def _outcome(networks: Networks) -> str:
    parts: list[str] = []
    for name in networks.names:
        before, rise = networks.number(name, "loss"), networks.number(name, "split", "both")
        if known(rise):
            change = f"from {show(before)} to {show(before + rise)}" if known(before) else f"by {show(rise)}"
            parts.append(f"{'that of' if parts else 'the loss of'} {name} changes {change}")
    return f"At {networks.scheme}, {join(parts)}." if parts else ""


def _setting(networks: Networks) -> str:
    found = networks.flatness
    if not found.get("images"):
        return ""
    labels = "" if found.get("labelled", True) else ", with the answers of the float network as labels"
    return f"Measured on {found['images']} images{labels}; low bits are {networks.scheme}."


def _advice(networks: Networks) -> list[str]:
    found = networks.flatness.get("advice")
    items = found if isinstance(found, list) else []
    return [str(item["text"]) for item in items if isinstance(item, dict) and item.get("text")]
