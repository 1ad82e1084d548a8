"""The metadata: what is written is read, and every value of another kind is refused in a sentence."""

from __future__ import annotations

import copy
import json

import pytest

from planish.deploy.checkpoint import read_head, save
from planish.deploy.packed.container import KEY, read_table
from planish.deploy.packed.head import read_head_from, version_of, write_head
from planish.errors import PlanishError
from planish.network import Assignment, ledger
from planish.network.ledger import build_ledger
from planish.ptq import quantize
from tests.deploy.tiny import LOOKS, network


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "q"
    model, images = network("vit")
    made = quantize(model, [images], "w4a4")
    protocol = {"seconds": float("nan"), "path": path, "rows": [{"top1": 0.5}], 3: (1, None)}
    save(made, path, preprocessing=LOOKS, protocol=protocol, classes=["a", "b", "ç"])
    with path.open("rb") as file:
        table = read_table(file)
    head = read_head(path)
    assert isinstance(head.assignment, Assignment)
    known = {row.site: row for row in ledger(made).rows}
    assert all(known[row.site].bits == row.bits for row in build_ledger(head.assignment).rows)
    assert head.protocol == {"seconds": None, "path": str(path), "rows": [{"top1": 0.5}], "3": [1, None]}
    assert json.loads(write_head(head)) == json.loads(table.metadata[KEY])
    return json.loads(table.metadata[KEY])


CHANGES = [
    (("recipe",), 3, "recipe is 3, expected dict"),
    (("protocol",), None, "protocol is None, expected dict"),
    (("classes",), ["a", 1], "something else than names"),
    (("classes",), "abc", "classes is 'abc', expected list or nothing"),
    (("tied",), {"a": 1}, "tied holds something else"),
    (("rebuilt",), [3], "name is missing"),
    (("rebuilt",), [{"name": "x"}], "arguments is missing"),
    (("packed", "head.weight"), ["head.weight", "F33", [3]], "no sound dtype and shape"),
    (("packed", "head.weight"), ["head.weight"], "no site, dtype and shape"),
    (("constant",), {"x": ["F32", [3], "1"]}, "'x' is '1', expected a F32"),
    (("constant",), {"x": ["I64", [3], 1.5]}, "expected a I64"),
    (("constant",), {"x": ["I64", [3], True]}, "expected a I64"),
    (("constant",), {"x": ["F32", [3], 1e300]}, "too large"),
    (("constant",), {"x": ["U8", [3], 10**30]}, "too large"),
    (("constant",), {"x": ["F32", [-3], 1]}, "no sound dtype"),
    (("preprocessing", "input_size"), [3, 10**9, 4], "no channels, height and width"),
    (("preprocessing", "input_size"), [1, 0, 4], "input_size"),
    (("preprocessing", "mean"), ["0.5"], "mean holds '0.5'"),
    (("preprocessing", "std"), [-1], "std"),
    (("preprocessing", "crop_pct"), True, "crop_pct is True"),
    (("preprocessing", "crop_pct"), 7.0, "crop_pct is 7.0"),
    (("preprocessing", "more"), 1, "'more' is not known"),
    (("quantized", "scheme", "weights", "bits"), 9, "a format has 2 to 8 bits"),
    (("quantized", "scheme", "weights", "bits"), "4", "bits is '4', expected int"),
    (("quantized", "scheme", "overrides"), [["a"]], "pairs of names"),
    (("quantized", "scheme", "overrides"), [["a", "w99"]], "not understood"),
    (("quantized", "scheme", "edge_bits"), 1, "edge_bits is 1"),
    (("quantized", "formats", 0, "granularity"), "row", "granularity is 'row'"),
    (("quantized", "formats", 0, "symmetric"), 1, "symmetric is 1, expected bool"),
    (("quantized", "allowed"), ["nothing"], "there is no such product"),
    (("quantized", "unreachable"), [["a"]], "something else than products"),
    (("quantized", "products", 0, "macs"), -1, "macs is -1"),
    (("quantized", "products", 0, "macs"), True, "macs is True"),
    (("quantized", "products", 0, "sites", 0, "format"), 99, "format 99 of"),
    (("quantized", "products", 0, "sites", 0, "format"), -1, "format -1 of"),
    (("quantized", "products", 0, "sites", 0, "role"), "king", "the role 'king'"),
    (("quantized", "products", 0, "sites", 0, "shape"), [2**60], "no sound shape"),
    (("quantized", "products", 0, "sites", 0, "axis"), 7, "no sound shape and axis"),
    (("quantized", "products", 0, "sites", 0, "slot"), 7, "slot is 7, expected str"),
    (("quantized", "products", 1, "module"), "patch_embed.proj", "twice|two formats"),
]


@pytest.mark.parametrize(("place", "value", "words"), CHANGES)
def test_values_of_another_kind(content, place, value, words):
    changed = copy.deepcopy(content)
    read_head_from(changed)
    if words == "twice|two formats":
        changed["quantized"]["products"][1] = changed["quantized"]["products"][0]
    target = changed
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(PlanishError, match=words):
        read_head_from(changed)


def test_every_name_is_needed(content):
    for name in content:
        if name != "version":
            with pytest.raises(PlanishError, match=f"{name} is missing"):
                read_head_from({key: value for key, value in content.items() if key != name})


@pytest.mark.parametrize("version", [0, 2, "1", None, True, [1]])
def test_other_versions(content, version):
    with pytest.raises(PlanishError, match=r"has format version .*; this planish reads version 1"):
        version_of({KEY: json.dumps({**content, "version": version})}, KEY)
    with pytest.raises(PlanishError, match="has format version None"):
        version_of({KEY: "[]"}, KEY)
