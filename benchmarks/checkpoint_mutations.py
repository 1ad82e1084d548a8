"""Damaged and hostile checkpoints: each must be refused by one sentence, quickly and in little memory, or load rightly.

Small checkpoints (a transformer at w4a4, one by groups at w3, a convolutional network at w2a2, one in float) are
mutated: bits flipped, ends cut off, headers edited, offsets swapped, sizes inflated, and, with the checksum made right
again so that the deeper checks are reached, metadata, recipes, tensors and values of grids replaced by hostile ones.
``load`` runs in this process, watched for its time, its memory, its imports and what it does beside reading.

    python benchmarks/checkpoint_mutations.py --count 100000 --out benchmarks/checkpoint_mutations.csv

A line of the CSV is a kind of mutation and what came of it: how many, the slowest in milliseconds, the most memory in
10^6 bytes beyond what the process had before. Exits 1 if anything comes out but a refusal or a right model.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from planish.deploy.checkpoint import load, save
from planish.deploy.packed.container import CHECKSUM, KEY, Entry, checksum
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.ptq import quantize
from planish.scheme import Format, Scheme

SLACK = 32e6  # bytes of memory allowed beside twice the size of the file
SLOWEST = 10.0  # seconds of the processor until a load counts as hanging
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**62, 10**30, 1e308, -0.5, 0.5, "", "x", "../../etc/passwd", "\ud800", "w4" * 5000,
    [], {}, [[[[]]]], [0] * 300, {"a": {"b": {}}}, [2**40, 2**40], "hf-hub:a/b", ["weight"], {"source": "file"},
]  # fmt: skip
ARGUMENTS: dict[str, list[Any]] = {
    "depth": [10**4, 10**9, -1, "x", 3], "embed_dim": [10**4, 10**12, 0, 17], "img_size": [10**4, 10**9, 0, [16, 2]],
    "num_heads": [0, 3, 10**9], "patch_size": [0, 1, 10**6], "num_classes": [10**7, 10**12, 0, -5],
    "pretrained": [True], "checkpoint_path": ["/etc/passwd"], "pretrained_cfg": [{"file": "/etc/passwd"}],
    "features_only": [True], "norm_layer": ["layernorm", "os.system"], "in_chans": [10**4, 0], "cache_dir": ["/tmp"],
    "block_fn": ["eval"], "mlp_ratio": [1e4, 1e300, "x"], "window_size": [200, 10**5], "device": ["cuda"],
    "depths": [[10**4] * 64, [2]], "layers": [[10**4] * 4], "weight_init": ["jax", "moco"],
}  # fmt: skip
ARCHITECTURES = [
    "resnet18", "vit_giant_patch14_224", "tiny_vit_5m_224", "hf-hub:timm/resnet18", "local-dir:/etc", "os.system",
    "vit_tiny_patch16_224.no_such_tag", "resnet18.a1_in1k", "swin_tiny_patch4_window7_224", "", "é", 7, None,
    "efficientnet_b7", "test_vit",
]  # fmt: skip


@dataclass
class Base:
    """A sound checkpoint, taken apart."""

    name: str
    content: bytes
    images: Tensor
    outputs: Tensor
    header: dict[str, Any] = field(init=False)
    data: bytes = field(init=False)

    def __post_init__(self) -> None:
        length = int.from_bytes(self.content[:8], "little")
        self.header, self.data = json.loads(self.content[8 : 8 + length]), self.content[8 + length :]

    def copy(self) -> tuple[dict[str, Any], dict[str, Any], bytearray]:
        """Header, head and bytes, free to be changed."""
        header = json.loads(json.dumps(self.header))
        return header, json.loads(header["__metadata__"][KEY]), bytearray(self.data)


def bases(folder: Path) -> list[Base]:
    """The checkpoints that are mutated."""
    vit = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 1,
           "num_classes": 4}  # fmt: skip
    groups = Scheme("w3", Format(3, "group", group_size=8), None)
    plain = {"in_chans": 1, "num_classes": 4}
    kinds: list[tuple[str, str, dict[str, Any], Any]] = [
        ("vit w4a4", "vit_tiny_patch16_224", vit, "w4a4"), ("vit w3 by groups", "vit_tiny_patch16_224", vit, groups),
        ("resnet w2a2", "test_resnet", plain, "w2a2"), ("vit in float", "vit_tiny_patch16_224", vit, None),
    ]  # fmt: skip
    made = []
    for name, architecture, arguments, scheme in kinds:
        torch.manual_seed(0)
        model = timm.create_model(architecture, **arguments).eval()
        images = torch.randn(4, 1, 16, 16)
        if scheme is not None:
            model = quantize(model, [images], scheme)
        path = folder / "base.safetensors"
        looks = Preprocessing((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
        save(model, path, preprocessing=looks, protocol={"method": "rtn", "rows": [1, 2.5]}, classes=list("abcd"))
        with torch.no_grad():
            made.append(Base(name, path.read_bytes(), images, model(images)))
    return made


def sealed(header: dict[str, Any], head: Any, data: bytes) -> bytes:
    """A file of these parts with a checksum that is right, as far as the parts allow one."""
    text = head if isinstance(head, str) else json.dumps(head)
    header["__metadata__"][KEY] = text
    try:
        entries = {
            name: Entry({"F32": torch.float32, "U8": torch.uint8, "I64": torch.int64, "F16": torch.float16,
                         "I32": torch.int32}[value["dtype"]], tuple(value["shape"]), *value["data_offsets"])
            for name, value in header.items() if name != "__metadata__"
        }  # fmt: skip
        header["__metadata__"][CHECKSUM] = checksum(text, entries, data)
    except (KeyError, TypeError, UnicodeEncodeError):  # it will be refused for something else before
        pass
    return assembled(json.dumps(header).encode(), data)


def assembled(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def hostile(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(HOSTILE))


def flipped(base: Base, draw: random.Random) -> bytes:
    content = bytearray(base.content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[draw.randrange(len(content) if draw.random() < 0.5 else 2000)] ^= 1 << draw.randrange(8)
    return bytes(content)


def cut(base: Base, draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return base.content + draw.randbytes(draw.randrange(1, 64))
    return base.content[: draw.randrange(len(base.content) if draw.random() < 0.7 else 64)]


def edited_header(base: Base, draw: random.Random) -> bytes:
    header, _, data = base.copy()
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    which = draw.choice(("dtype", "shape", "data_offsets", "item"))
    if which == "item" and entry["shape"]:
        entry["shape"][draw.randrange(len(entry["shape"]))] = draw.choice((-1, 0, 2**20, 2**63, "3", 1.5, None))
    else:
        entry[draw.choice(("dtype", "shape", "data_offsets"))] = draw.choice([hostile(draw), "F32", "U8", "F8_E4M3"])
    return assembled(json.dumps(header).encode(), data)


def swapped(base: Base, draw: random.Random) -> bytes:
    header, head, data = base.copy()
    a, b = draw.sample([name for name in header if name != "__metadata__"], 2)
    header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]
    return sealed(header, head, data) if draw.random() < 0.5 else assembled(json.dumps(header).encode(), data)


def huge(base: Base, draw: random.Random) -> bytes:
    header, head, data = base.copy()
    name = draw.choice([name for name in header if name != "__metadata__"])
    count = draw.choice((2**31, 2**40, 2**47))
    header[name]["shape"] = draw.choice(([count], [count, count], [1, count, 1]))
    header[name]["data_offsets"][1] = header[name]["data_offsets"][0] + 4 * count
    if draw.random() < 0.3:
        length = draw.choice((2**20, 2**32, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + base.content[8:]
    return sealed(header, head, data) if draw.random() < 0.5 else assembled(json.dumps(header).encode(), data)


def odd_json(base: Base, draw: random.Random) -> bytes:
    header, head, data = base.copy()
    text = json.dumps(head)
    inside = draw.choice((
        "[" * 100_000, '{"a":' * 50_000, "NaN", '{"version":1,"version":1}', text.replace("1", "1" * 5000, 1),
        text[: draw.randrange(len(text))], text.replace('"version": 1', '"version": "1"'), "\x00", "[" + "1," * 300_000,
        text.replace("0.5", "1e999"), text.replace("0.5", "Infinity"), '"' + "x" * 2_000_000 + '"',
    ))  # fmt: skip
    if draw.random() < 0.5:
        return sealed(header, inside, data)
    outer = json.dumps(header).encode()
    name = draw.choice(list(header)).encode()
    outer = draw.choice((
        b"{" + b'"' + name + b'": {}, ' + outer[1:], outer.replace(name, b"\xff\xfe", 1), b'{"a":' * 100_000,
        outer.replace(b'"F32"', b'"F32", "dtype": "F32"', 1), b"{" + b"[" * 200_000, b"{}", b"[]",
    ))  # fmt: skip
    return assembled(outer, data)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def edited_head(base: Base, draw: random.Random) -> bytes:
    header, head, data = base.copy()
    for _ in range(draw.choice((1, 1, 1, 3))):
        top = draw.choice(list(head))
        spots = [(top, *rest) for rest in places(head[top])] or [(top,)]
        *way, last = draw.choice([*spots, (top,)])
        target = head
        for key in way:
            target = target[key]
        action = draw.random()
        if action < 0.15:
            del target[last]
        elif action < 0.25 and isinstance(target, dict):
            target[draw.choice(("x", "version", "__class__", "weight"))] = hostile(draw)
        elif action < 0.35 and isinstance(target, list):
            target.extend(copy.deepcopy([target[last]] * draw.choice((1, 2, 50))))
        else:
            other = head[draw.choice(list(head))] if draw.random() < 0.05 else hostile(draw)
            target[last] = copy.deepcopy(other)
        if not head:
            break
    return sealed(header, head, data)


def edited_recipe(base: Base, draw: random.Random) -> bytes:
    header, head, data = base.copy()
    recipe = head["recipe"]
    if draw.random() < 0.3:
        recipe["architecture"] = draw.choice(ARCHITECTURES)
    if draw.random() < 0.1:
        head["recipe"] = {"source": "file", "path": draw.choice(("/etc/passwd", "x.py", 3)), "function": "build"}
    if draw.random() < 0.2:
        head["rebuilt"] = [{"name": draw.choice(("query-key", "rms-norm", "block-compensation", "x")), "arguments":
                            draw.choice(({}, {"norms": ["norm"]}, {"blocks": [["blocks.0", 10**6, True]] * 50},
                                         {"norms": ["norm"] * 9, "scales": [""]}))}]  # fmt: skip
    for _ in range(draw.choice((0, 1, 1, 2))):
        name = draw.choice(list(ARGUMENTS))
        recipe["arguments"][name] = copy.deepcopy(draw.choice([*ARGUMENTS[name], hostile(draw)]))
    return sealed(header, head, data)


def edited_tensors(base: Base, draw: random.Random) -> bytes:
    """Names, types and shapes that the file allows and the model does not."""
    header, head, data = base.copy()
    names = [name for name in header if name != "__metadata__"]
    name, other = draw.sample(names, 2)
    entry, action = header[name], draw.randrange(6)
    if action == 0:
        header[draw.choice(("x", name + ".x", "planish_taps.weight.scale", name.replace("weight", "bias")))] = entry
        del header[name]
    elif action == 1:
        header[name], header[other] = header[other], header[name]
    elif action == 2:
        entry["dtype"] = {"F32": "I32", "U8": "U8", "I64": "I64"}[entry["dtype"]]
        entry["shape"] = [1, *entry["shape"]]
    elif action == 3 and entry["dtype"] == "F32":
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["dtype"], entry["shape"] = draw.choice((("U8", [size]), ("F16", [size // 2])))
    elif action == 4:
        head["tied"][name] = other
    else:
        head["constant"][draw.choice((name, "x"))] = ["F32", draw.choice(([8], [2**40], entry["shape"])), 0.5]
    return sealed(header, head, data)


def edited_values(base: Base, draw: random.Random) -> bytes:
    """Grids that are none, and codes that were never written."""
    header, head, data = base.copy()
    floats = [name for name in header if name != "__metadata__" and header[name]["dtype"] == "F32"]
    grids = [name for name in floats if name.endswith(("scale", "zero_point"))]
    name = draw.choice(grids if grids and draw.random() < 0.7 else floats)
    begin, end = header[name]["data_offsets"]
    if draw.random() < 0.1 and head["packed"]:
        begin, end = header[draw.choice(list(head["packed"]))]["data_offsets"]
        data[end - 1] = 255
    elif end > begin:
        place = begin + 4 * draw.randrange((end - begin) // 4)
        value = draw.choice((float("nan"), float("inf"), -1.0, 0.0, 1e-45, 1e38, 0.5, 300.0))
        data[place : place + 4] = torch.tensor([value]).numpy().tobytes()
    return sealed(header, head, data)


def foreign(base: Base, draw: random.Random) -> bytes:
    kind = draw.randrange(5)
    if kind == 0:
        return draw.randbytes(draw.randrange(0, 4096))
    if kind == 1:
        return b"PK\x03\x04" + draw.randbytes(500)
    if kind == 2:
        return b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00echo\x85R."
    if kind == 3:
        return assembled(b'{"__metadata__":{"planish_quantized":"{}"}}', b"")
    return assembled(b"{" + draw.randbytes(draw.randrange(200)), b"")


# mutation -> whether its checksum may be right, so that a file that loads may hold another model
KINDS: dict[str, tuple[Callable[[Base, random.Random], bytes], bool]] = {
    "flipped bits": (flipped, False), "cut or lengthened": (cut, False), "header edited": (edited_header, False),
    "offsets swapped": (swapped, True), "huge sizes": (huge, True), "odd JSON": (odd_json, True),
    "head edited, sealed": (edited_head, True), "recipe edited, sealed": (edited_recipe, True),
    "tensors edited, sealed": (edited_tensors, True), "values edited, sealed": (edited_values, True),
    "foreign content": (foreign, False),
}  # fmt: skip


SHARES = [1 if "recipe" in kind else 4 for kind in KINDS]  # a recipe costs ten times as much: it is built


@dataclass
class Outcome:
    """What came of one mutation; ``wrong`` says what must not be."""

    kind: str
    result: str
    seconds: float
    memory: float
    wrong: str = ""


class Hanging(BaseException):
    """No refusal: TimeoutError would be one, as an OSError."""


class Watch:
    """What the process does and takes while a file is loaded."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Any) -> None:
        if self.on and event.split(".")[0] in ("import", "socket", "subprocess", "pickle", "exec", "ctypes", "shutil"):
            what = getattr(args[0], "co_filename", args[0]) if args else ""
            if not (event == "exec" and str(what).startswith("<")):  # dataclasses, named tuples
                self.events.append(f"{event} {what}")

    def memory(self, *, peak: bool) -> float:
        """Bytes that the process holds; the peak since it was last asked for the present."""
        try:
            if not peak:
                Path("/proc/self/clear_refs").write_text("5")
            status = Path("/proc/self/status").read_text()
        except OSError:  # no Linux
            return 0.0
        return 1024.0 * int(re.findall(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", status)[0])


def judge(kind: str, base: Base, content: bytes, path: Path, watch: Watch, may_differ: bool) -> Outcome:
    """Load one mutated file."""
    path.write_bytes(content)
    watch.events.clear()
    before, began, model, wrong = watch.memory(peak=False), time.perf_counter(), None, ""
    watch.on = True
    signal.setitimer(signal.ITIMER_PROF, SLOWEST)
    try:
        model, result = load(path), "loaded"
    except PlanishError as error:
        result = str(error)
        if not result.startswith(str(path)) or "\n" in result or len(result) > 700:
            wrong = "the sentence does not name the file, or is no sentence"
    except BaseException as error:  # the point of all this
        if isinstance(error, KeyboardInterrupt):
            raise
        result, wrong = f"{type(error).__name__}: {error}", "neither loaded nor refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.on = False
    seconds, memory = time.perf_counter() - began, max(0.0, watch.memory(peak=True) - before)
    allowed = 2 * len(content) + SLACK
    if model is not None:
        allowed += 12 * sum(p.numel() for p in model.parameters())
        if not may_differ or content == base.content:
            with torch.no_grad():
                wrong = "" if torch.equal(model(base.images), base.outputs) else "it computes something else"
    if memory > allowed:
        wrong = wrong or f"{memory / 1e6:.1f} MB of memory for a file of {len(content) / 1e6:.2f} MB"
    if watch.events:
        wrong = wrong or f"beside reading: {watch.events[0]}"
    return Outcome(kind, shortened(result, path), seconds, memory, wrong)


def shortened(text: str, path: Path) -> str:
    """A refusal without what is particular to one file."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "...", text.replace(str(path), "").lstrip(": "))
    return re.sub(r"-?\d[\d.e+]*", "N", text).split(" (")[0].split(": ")[0][:70]


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Load ``count`` mutations."""
    draw, sound, watch = random.Random(seed), bases(folder), Watch()
    path = folder / "mutated.safetensors"
    for base in sound:  # so that nothing is imported for the first time later
        path.write_bytes(base.content)
        load(path)
    for architecture in ARCHITECTURES[:3]:
        with torch.device("meta"):
            timm.create_model(architecture)

    def alarm(*_: Any) -> None:
        raise Hanging(f"still loading after {SLOWEST} s of the processor")

    signal.signal(signal.SIGPROF, alarm)
    for _ in range(count):
        kind, base = draw.choices(list(KINDS), SHARES)[0], draw.choice(sound)
        mutate, may_differ = KINDS[kind]
        yield judge(kind, base, mutate(base, draw), path, watch, may_differ)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="CSVs of other seeds, to be counted in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    slowest: dict[tuple[str, str], float] = {}
    most: dict[tuple[str, str], float] = {}
    wrong, began = 0, time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it was started in the background
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:  # what was done by then is written
        for i, outcome in enumerate(outcomes(args.count, args.seed, Path(folder)), 1):
            key = outcome.kind, outcome.result
            counts[key] += 1
            slowest[key] = max(slowest.get(key, 0.0), outcome.seconds)
            most[key] = max(most.get(key, 0.0), outcome.memory)
            if outcome.wrong:
                wrong += 1
                print(f"{i}: {outcome.kind}: {outcome.wrong} ({outcome.result})", flush=True)
            if i % 1000 == 0:
                print(f"{i} of {args.count}, {time.perf_counter() - began:.0f} s, {wrong} wrong", flush=True)
    for other in args.add:
        for row in csv.DictReader(other.read_text().splitlines()):
            key = row["mutation"], row["outcome"]
            counts[key] += int(row["count"])
            slowest[key] = max(slowest.get(key, 0.0), float(row["slowest_ms"]) / 1e3)
            most[key] = max(most.get(key, 0.0), float(row["most_memory_mb"]) * 1e6)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mutation", "outcome", "count", "slowest_ms", "most_memory_mb"])
        for key, number in sorted(counts.items(), key=lambda item: (item[0][0], -item[1])):
            writer.writerow([*key, number, f"{1e3 * slowest[key]:.1f}", f"{most[key] / 1e6:.1f}"])
    done = sum(counts.values())
    refused = sum(n for (_, result), n in counts.items() if result != "loaded")
    seconds = time.perf_counter() - began
    print(f"{done} mutations: {refused} refused, {done - refused} loaded, {wrong} wrong, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
