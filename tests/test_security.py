"""What SECURITY.md promises of the sources: no code from data, no network without being asked, no markup from names."""

from __future__ import annotations

import ast
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import planish
from planish.data import load_data, make_loader
from planish.report.html import write_report

SOURCES = sorted((Path(__file__).parents[1] / "src" / "planish").rglob("*.py"))
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
    "shelve.open", "yaml.load", "pd.read_pickle", "joblib.load", "dill.load", "torch.jit.load", "tempfile.mktemp",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.hub.load",
}  # fmt: skip
IMPORTERS = {"cli/main.py", "__init__.py"}  # of planish's own modules, by names that stand there
FOREIGN = "models/foreign.py"  # the one place where foreign code is run
PROCESSES = {"report/environment.py"}


def named(node: ast.AST) -> str:
    """``a.b.c`` of a call's function; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = named(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def faults(source: str, name: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [m for m in modules if m.split(".")[0] in ("requests", "urllib3", "httpx", "dill", "cloudpickle")]
        if not isinstance(node, ast.Call):
            continue
        called, options = named(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if called in FORBIDDEN:
            found.append(called)
        if called in ("torch.load", "torch.hub.load_state_dict_from_url") and not is_constant(
            options, "weights_only", True
        ):
            found.append(f"{called} without weights_only")
        if called == "np.load" and not is_constant(options, "allow_pickle", False):
            found.append("np.load without allow_pickle=False")
        if "shell" in options or is_constant(options, "trust_remote_code", True):
            found.append(f"{called} with a shell or foreign code")
        if called.startswith("subprocess.") and name not in PROCESSES:
            found.append(called)
        if called.endswith("exec_module") and name != FOREIGN:
            found.append(called)
        if called.endswith("import_module") and name not in IMPORTERS:
            found.append(called)
        if called.endswith("Environment") and not is_constant(options, "autoescape", True):
            found.append("a template without escapes")
    return found


def is_constant(options: dict[str | None, ast.expr], name: str, value: object) -> bool:
    found = options.get(name)
    return isinstance(found, ast.Constant) and found.value is value


def test_no_source_runs_what_it_reads():
    assert len(SOURCES) > 200
    root = Path(planish.__file__).parent
    told = {str(p.relative_to(root)): faults(p.read_text(), p.relative_to(root).as_posix()) for p in SOURCES}
    assert {name: found for name, found in told.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "torch.load(p)", "torch.load(p, weights_only=False)", "import cloudpickle", "pickle.loads(b)",
        "subprocess.run(a)", "run(a, shell=True)", "np.load(p)", "Environment()", "spec.loader.exec_module(m)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)", "torch.hub.load_state_dict_from_url(u)",
    ],
)  # fmt: skip
def test_the_walk_sees_it(source):
    assert faults(source, "x.py")


def test_templates_switch_no_escape_off():
    root = Path(planish.__file__).parent
    templates = list(root.rglob("*.j2"))
    assert len(templates) >= 4
    for template in templates:
        text = template.read_text()
        assert "autoescape" not in text
        kept = {line.strip() for line in text.splitlines() if "|safe" in line.replace(" ", "")}
        assert all("svg" in line or "chart" in line or "picture" in line for line in kept), kept


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.middle, self.head = nn.Conv2d(1, 4, 3, 4), nn.Conv2d(4, 4, 3, 2), nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.conv(images).relu()).mean((2, 3)))


WATCHED: list[list[str]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if WATCHED and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
                             "socket.bind", "urllib.Request", "http.client.connect"):  # fmt: skip
        WATCHED[-1].append(f"{event} {arguments!r:.200}")


@pytest.fixture
def network(monkeypatch):
    """What was asked of the network; nothing gets there."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    if not getattr(sys, "_planish_hook", False):
        sys.addaudithook(_hook)
        sys._planish_hook = True
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    WATCHED.append([])
    yield WATCHED[-1]
    WATCHED.pop()


def test_nothing_is_asked_of_the_network(network, tmp_path):
    torch.set_num_threads(1)
    loaded = planish.load_model("convnet")
    data = load_data(None, loaded.preprocessing)
    planish.evaluate(loaded.model, make_loader(Subset(data.test, range(8)), 8, shuffle=False, seed=0))
    small = Small()  # the embedded networks take half a minute to export
    small.planish_preprocessing = loaded.preprocessing
    part = Subset(data.train, range(64))
    train = make_loader(part, 32, shuffle=True, seed=0, augment=True)
    calibration = make_loader(part, 32, shuffle=False, seed=0)
    flat = planish.flatten(small, train, scheme="w4a4", epochs=1)
    quantized = planish.quantize(flat, calibration, "w4a4")
    worth = planish.evaluate(quantized, calibration)
    planish.save(loaded.model, tmp_path / "m.safetensors")
    planish.load(tmp_path / "m.safetensors")
    planish.export(quantized, tmp_path / "m.onnx", classes=data.classes)
    row = {"arm": "flat", "scheme": "w4a4", "method": "rtn", "seed": 0, **worth}
    write_report({"protocol": {"model": "convnet"}, "rows": [row]}, tmp_path / "report.html")
    assert network == []


def test_the_watch_sees_a_question(network):
    import urllib.request

    with pytest.raises(OSError, match="no network"):
        urllib.request.urlopen("http://planish.invalid/", timeout=1)
    assert network


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [f"{tag} {name}" for name, _ in attrs]


@pytest.mark.parametrize("evil", ['"><img src=x onerror=alert(1)>', "<script>alert(1)</script>", "{{7*7}}{% raw %}"])
def test_names_of_files_classes_and_models_are_only_text_in_the_report(evil, tmp_path):
    row = {"arm": evil, "scheme": "w4a4", "method": evil, "seed": 0, "top1": 0.5, "fp_top1": 0.9}
    results = {
        "protocol": {"model": evil, "data": evil, evil: evil}, "environment": {"host": evil}, "rows": [row],
        "ledger": [{"site": evil, "operator": evil, "bits": 4, "granularity": evil, "share": 0.1}],
    }  # fmt: skip
    page = Tags(write_report(results, tmp_path / "r.html").read_text())
    plain = Tags(write_report({**results, "rows": [{**row, "arm": "a"}]}, tmp_path / "p.html").read_text())
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name in page.attributes if name.split(" ")[1].startswith("on")]
    assert set(page.tags) == set(plain.tags)
    assert "7*7" in (tmp_path / "r.html").read_text() or "{{" not in evil
