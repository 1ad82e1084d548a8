"""The chapters on why a network breaks: what they draw, their numbers, and that nothing missing disturbs them."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from collections.abc import Iterator
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest

from planish.report.diagnosis import Picture, Section, Table, errors, landscape, noise, split, tell
from planish.report.diagnosis.bars import short_names
from planish.report.diagnosis.histograms import representative
from planish.report.diagnosis.parts import Networks, show, with_error
from planish.report.plain import to_plain
from planish.report.svg import HEAT_LIGHT, LIGHT
from tests.report.flatness import fake_flatness

KEYS = ["landscape", "errors", "split", "curvature", "noise", "prediction", "damage"]

DRAWN = {
    "landscape": ("line_chart", "_draw_plane"),
    "histograms": ("_draw",),
    "split": ("bar_chart", "ranked_chart"),
    "curvature": ("line_chart", "ranked_chart"),
    "noise": ("line_chart",),
    "prediction": ("_draw",),
    "damage": ("_draw", "ranked_chart"),
}


@pytest.fixture(scope="module")
def told() -> list[Section]:
    return tell(fake_flatness()).sections


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is drawn: what is left takes milliseconds."""
    for module, names in DRAWN.items():
        for name in names:
            monkeypatch.setattr(f"planish.report.diagnosis.{module}.{name}", lambda *_, **__: "<svg/>")


def pictures(sections: list[Section]) -> dict[str, Picture]:
    return {picture.title: picture for section in sections for group in section.pictures for picture in group}


def numbers(part: Picture | Table) -> list[dict[str, str]]:
    assert part.data is not None
    return list(csv.DictReader(io.StringIO(part.data.text)))


def words(picture: Picture) -> str:
    return str(ElementTree.fromstring(picture.svg).get("aria-label"))


def test_all_chapters_in_order_with_words_and_numbers(told: list[Section]) -> None:
    assert [section.key for section in told] == KEYS
    found = pictures(told)
    assert len(found) == sum(len(group) for section in told for group in section.pictures) >= 18
    for picture in found.values():
        root = ElementTree.fromstring(picture.svg)
        assert root.get("role") == "img"
        assert len(words(picture)) > 60
        assert "nan" not in words(picture)
        assert numbers(picture)
        assert re.search(r"\d", words(picture))
    names = [picture.data.name for picture in found.values() if picture.data]
    assert len(set(names)) == len(names) - 1  # loss and top-1 along the rounding are one file


def test_numbers_behind_a_picture_are_those_of_the_diagnosis(told: list[Section]) -> None:
    flatness = fake_flatness()
    rows = numbers(pictures(told)["Loss along the rounding of weights"])
    path = flatness["networks"]["flat"]["sharpness"]["rounding"]
    assert [float(row["loss"]) for row in rows if row["network"] == "flat"] == pytest.approx([p["loss"] for p in path])
    rows = numbers(pictures(told)["Rise of the loss by product, the worst"])
    layers = flatness["networks"]["given"]["split"]["layers"]
    mine = {row["product"]: row for row in rows if row["network"] == "given"}
    assert len(mine) == len(layers) > 12
    for layer in layers:
        assert float(mine[layer["product"]]["both"]) == pytest.approx(layer["both"], rel=1e-5)
    plane = flatness["networks"]["given"]["landscape"]["plane"]
    rows = numbers(pictures(told)["Loss on a plane: given"])
    assert [float(row["loss"]) for row in rows] == pytest.approx([x for line in plane["loss"] for x in line], rel=1e-5)
    assert rows[0]["a"] == rows[1]["a"]
    assert rows[0]["b"] != rows[1]["b"]
    measured = {
        (row["network"], row["scheme"]): row for row in numbers(pictures(told)["Top-1, predicted and measured"])
    }
    assert measured["given", "w6a6"]["measured_top1"] == ""
    assert float(measured["given", "w3a3"]["low"]) == pytest.approx(0.9 - 1.4 * 0.15)


def test_words_of_a_picture_hold_its_main_numbers(told: list[Section]) -> None:
    found = pictures(told)
    assert "given: weights 0.220, activations 0.310, interaction 0.0500, both 0.580" in words(
        found["Rise of the loss, split"]
    )
    assert "0 is float and 1 is rounded. given: 0.310 at 0, " in words(found["Loss along the rounding of weights"])
    assert "given: 91.2, 60.8, 45.6, 36.5, 30.4." in words(found["Largest eigenvalues of the Hessian"])
    assert "0.310 at the network itself" in words(found["Loss on a plane: flat"])
    assert "w4a4 86.9 % predicted, 86.6 % measured" in words(found["Top-1, predicted and measured"])


def test_the_worst_products_of_any_network_are_shown_first(told: list[Section]) -> None:
    networks = fake_flatness()["networks"]
    worst: dict[str, float] = {}
    for network in networks.values():
        for layer in network["split"]["layers"]:
            worst[layer["product"]] = max(worst.get(layer["product"], -1), layer["both"])
    order = sorted(worst, key=lambda product: -worst[product])
    spoken = words(pictures(told)["Rise of the loss by product, the worst"])
    assert re.findall(r"(\S+) [\d.]+", spoken.partition("given: ")[2].partition(" flat:")[0])[:3] == order[:3]


def test_verdicts_are_counted(told: list[Section]) -> None:
    (chapter,) = (section for section in told if section.key == "errors")
    sites = fake_flatness()["networks"]["given"]["errors"]["sites"]
    count = sum(site["verdict"] == "gaussian" for site in sites)
    assert f"given: of {len(sites)} sites " in chapter.notes[0]
    assert f"{count} are Gaussian" in chapter.notes[0]
    every = next(table for table in chapter.tables if table.folded)
    assert len(every.rows) == len(sites)
    assert len(numbers(every)) == 2 * len(sites)
    assert "histogram" not in numbers(every)[0]
    assert "crowding" in numbers(every)[0]


def sharpest() -> float:
    return max(x for line in fake_flatness()["networks"]["given"]["landscape"]["plane"]["loss"] for x in line)


def test_planes_share_their_colours(told: list[Section]) -> None:
    labels = []
    for name in ("given", "flat"):
        root = ElementTree.fromstring(pictures(told)[f"Loss on a plane: {name}"].svg)
        labels.append(["".join(node.itertext()) for node in root.iter("text")])
    assert labels[0] == labels[1]
    assert f"{sharpest():.2g}" in labels[0]
    flat = pictures(told)["Loss on a plane: flat"].svg
    assert f"var(--heat-0, {HEAT_LIGHT[0]})" in flat
    tops = []
    for name in ("given", "flat"):
        root = ElementTree.fromstring(pictures(told)[f"Loss on a plane: {name}"].svg)
        bands = [node for node in root.iter("path") if "var(--heat-9, " in node.get("style", "")]
        tops.append(max(len(node.get("d") or "") for node in bands))
    assert tops[0] > 2 * tops[1]  # only the sharp one reaches the top; the other has it in the bar of colours alone


def test_networks_have_the_colours_of_their_arms(told: list[Section]) -> None:
    svg = pictures(told)["Loss along a random direction"].svg
    assert f"var(--arm-0, {LIGHT[0]})" in svg
    assert f"var(--arm-4, {LIGHT[4]})" in svg
    assert "var(--arm-1, " not in svg
    bare = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", "".join(p.svg for p in pictures(told).values()))
    assert set(re.findall(r"#[0-9a-f]{6}\b", bare)) <= {"#000000"}


def test_ids_are_unique_over_all_pictures(told: list[Section]) -> None:
    ids = [found for picture in pictures(told).values() for found in re.findall(r'\bid="([^"]+)"', picture.svg)]
    assert len(ids) == len(set(ids))


def test_the_measure_that_predicts_best_comes_first(undrawn: None) -> None:
    flatness = fake_flatness()
    flatness["headline"]["others"] = [{"name": "the moon", "text": "", "values": {"given": 3.5}}]
    story = tell(flatness)
    assert story.headline is not None
    assert story.headline.values == [("given", 0, "0.220"), ("flat", 4, "0.129")]
    assert story.measures is not None
    lines = {row[0]: tuple(row[1:]) for row in story.measures.rows}
    assert lines["trace of the Hessian"] == ("812 \N{PLUS-MINUS SIGN} 31", "478 \N{PLUS-MINUS SIGN} 18")
    assert lines["SAM: worst rise nearby (\N{GREEK SMALL LETTER RHO} = 0.05)"][0] == "0.1100 \N{PLUS-MINUS SIGN} 0.0040"
    near = "rise under noise on the weights (\N{GREEK SMALL LETTER SIGMA} = 0.25 steps)"  # 0.289 is what rounding has
    assert lines[near][0] == show(2.5 * 0.25**2)
    assert lines["the moon"] == ("3.50", "\N{EN DASH}")
    assert story.setting == "Measured on 512 images; low bits are w4a4."
    assert len(story.advice) == 2
    assert story.outcome == (
        "At w4a4, the loss of given changes from 0.310 to 0.890 and that of flat changes from 0.322 to 0.588."
    )
    assert "with the answers of the float network as labels" in tell({**flatness, "labelled": False}).setting


def test_what_a_measure_tells_stands_beside_it() -> None:
    flatness = fake_flatness()
    found = flatness["networks"]["given"]
    scheme = flatness["scheme"]
    story = tell(flatness)
    assert story.measures is not None
    lines = {row[0]: row for row in story.measures.rows}
    (at,) = [row for row in found["prediction"] if row["scheme"] == scheme]
    at["divergence"] = 0.123
    path = {row["t"]: row["loss"] for row in found["sharpness"]["rounding"]}
    assert float(lines["rise along the rounding of the weights"][1]) == pytest.approx(path[1.0] - path[0.0], rel=0.01)
    flatness["headline"]["ranks"] = {"imitated": "0.80 / 0.70", "trace": "0.05 / 0.10"}
    story = tell(flatness)
    assert story.measures is not None
    assert story.measures.header[-1] == "tells"
    told = {row[0]: row for row in story.measures.rows}
    assert told["divergence under imitated rounding"][1] == "0.123"
    assert told["divergence under imitated rounding"][-1] == "0.80 / 0.70"
    assert told["trace of the Hessian"][-1] == "0.05 / 0.10"
    assert told["loss in float"][-1] == "\N{EN DASH}"


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of nested dicts, three levels below a network."""
    for key in value:
        yield (*before, key)
        if isinstance(value[key], dict) and len(before) < 4:
            yield from paths(value[key], (*before, key))


GONE = object()


def without(flatness: dict[str, Any], path: tuple[str, ...], instead: Any) -> None:
    """Put something else in the place of a value, or nothing at all."""
    place: Any = flatness
    for key in path[:-1]:
        place = place.get(key)
        if not isinstance(place, dict):  # something above it is gone already
            return
    if instead is GONE:
        place.pop(path[-1], None)
    else:
        place[path[-1]] = instead


@pytest.mark.parametrize("instead", [GONE, None, "word", [{}]], ids=["gone", "none", "word", "list"])
def test_whatever_is_missing_leaves_the_rest(instead: Any, undrawn: None) -> None:
    whole = fake_flatness(("given", "flat"), blocks=1)
    for path in paths(fake_flatness(("given",), blocks=1)):
        flatness = copy.deepcopy(whole)
        without(flatness, path, instead)
        story = tell(flatness)
        if path != ("networks",):
            assert {section.key for section in story.sections} == set(KEYS), path  # the other network has it all


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_missing_the_rest_is_drawn(seed: int) -> None:
    random = Random(seed)
    flatness = fake_flatness(("given", "flat"), blocks=1)
    for path in paths(fake_flatness(("given", "flat"), blocks=1)):
        if path != ("networks",) and random.random() < 0.2:
            without(flatness, path, random.choice([GONE, None, math.nan, [], {}, "word", [{}]]))
    for picture in pictures(tell(flatness).sections).values():
        assert "nan" not in words(picture)


def test_a_chapter_that_no_network_has_is_not_there(undrawn: None) -> None:
    flatness = fake_flatness(blocks=1)
    for network in flatness["networks"].values():
        del network["curvature"], network["damage"], network["sharpness"]
    assert [section.key for section in tell(flatness).sections] == ["landscape", "errors", "split", "prediction"]
    for network in flatness["networks"].values():
        network.clear()
    story = tell(flatness)
    assert story.sections == []
    assert story.measures is None
    assert tell({}).outcome == tell({"networks": None}).outcome == ""


def test_numbers_that_are_none_become_gaps_and_dashes(undrawn: None) -> None:
    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: emptied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [emptied(item) for item in value]
        return math.nan if isinstance(value, float) else value

    flatness = fake_flatness(("given", "flat"), blocks=1)
    flatness["networks"]["flat"] = emptied(flatness["networks"]["flat"])
    story = tell(flatness)
    assert {section.key for section in story.sections} == set(KEYS)
    assert "nan" not in json.dumps(to_plain(story)).lower().replace("nano", "")
    flatness["networks"]["given"] = emptied(flatness["networks"]["given"])
    left = tell(flatness).sections
    assert "split" not in {section.key for section in left}
    assert "nan" not in json.dumps(to_plain(left)).lower()


def test_same_diagnosis_same_bytes(told: list[Section]) -> None:
    networks = Networks.of(fake_flatness())
    assert [landscape.section(networks), errors.section(networks)] == told[:2]


def test_infinities_and_large_ranges_are_drawn() -> None:
    flatness = fake_flatness(("given",), blocks=1)
    sharpness = flatness["networks"]["given"]["sharpness"]
    sharpness["weight_noise"] = [{"sigma": s, "loss": 10.0**s, "error": math.inf} for s in range(-3, 9)]
    chapter = noise.section(Networks.of(flatness))
    assert chapter is not None
    svg = pictures([chapter])["Noise on the weights"].svg
    labels = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("text")]
    assert "1e8" in labels
    assert "0.01" in labels


def test_representative_sites_are_of_every_kind_in_the_order_of_execution() -> None:
    sites = fake_flatness()["networks"]["given"]["errors"]["sites"]
    chosen = representative(sites)
    assert len(chosen) == 6
    order = [site["site"] for site in sites]
    assert chosen == sorted(chosen, key=order.index)
    kinds = {(site["role"], site["verdict"]) for site in sites if site["site"] in chosen}
    assert len(kinds) == 6
    assert representative(sites[:2]) == order[:2]
    assert representative([{**site, "histogram": None} for site in sites]) == []


def test_short_names_differ_and_keep_what_tells_most() -> None:
    names = [
        "blocks.0.attn.qkv.linear",
        "stages.blocks.11.attn.attention_qk",
        "stages.blocks.12.attn.attention_qk",
        "head.linear",
    ]
    assert list(short_names(names).values()) == [
        "blocks.0.attn.qkv",
        "s.b.11.attn.attention_qk",
        "s.b.12.attn.attention_qk",
        "head",
    ]
    long = [f"{'x' * 40}{i}{'y' * 40}" for i in range(3)]
    shown = short_names(long)
    assert len(set(shown.values())) == 3
    assert all(len(text) <= 30 for text in shown.values())
    assert list(short_names(["a.b.weight", "c.d.weight"]).values()) == ["a.b", "c.d"]
    assert short_names(["_hidden"])["_hidden"] != "_hidden"


def test_a_shortened_label_tells_its_whole_name() -> None:
    flatness = fake_flatness(("given",), blocks=1, depth="model.backbone.stages.blocks")
    chapter = split.section(Networks.of(flatness))
    assert chapter is not None
    svg = pictures([chapter])["Rise of the loss by product"].svg
    titles = [node.text for node in ElementTree.fromstring(svg).iter("title")]
    assert "model.backbone.stages.blocks.0.attn.attention_qk" in titles


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.31, "0.310"), (812.4, "812"), (0.0, "0"), (-0.0123, "\N{MINUS SIGN}0.0123"), (1.5e-7, "1.50e\N{MINUS SIGN}7"),
     (3.2e9, "3.20e9"), (math.nan, "\N{EN DASH}")],
)  # fmt: skip
def test_numbers_as_text(value: float, text: str) -> None:
    assert show(value) == text


def test_an_error_decides_the_digits() -> None:
    assert with_error(812.44, 30.6) == "812 \N{PLUS-MINUS SIGN} 31"
    assert with_error(0.12345, 0.0123) == "0.123 \N{PLUS-MINUS SIGN} 0.012"
    assert with_error(81244.0, 3060.0) == "81200 \N{PLUS-MINUS SIGN} 3100"
    assert with_error(0.5, math.nan) == "0.500"
