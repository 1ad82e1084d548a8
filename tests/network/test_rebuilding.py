"""Changes of structure by name: noted in the network, and made again from the notes."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import planish
from planish.errors import PlanishError
from planish.network import reparameterize_query_key
from planish.network.rebuilding import rebuild, rebuilder, rebuilt
from tests.training import tiny


@rebuilder("test: widen")
def widen(model, path="0", by=2):
    if not hasattr(model, "0"):
        return []
    old = model.get_submodule(path)
    setattr(model, path, nn.Linear(old.in_features, by * old.out_features))
    return [path]


def network():
    return nn.Sequential(nn.Linear(3, 4))


def test_what_was_done_is_noted_in_order_and_done_again():
    model = network()
    assert rebuilt(model) == []
    widen(model, by=3)
    widen(model, "0", by=1)
    assert rebuilt(model) == [
        {"name": "test: widen", "arguments": {"by": 3}},
        {"name": "test: widen", "arguments": {"path": "0", "by": 1}},
    ]
    again = network()
    rebuild(again, rebuilt(copy.deepcopy(model)))
    again.load_state_dict(model.state_dict())
    assert rebuilt(again) == rebuilt(model)


def test_what_changed_nothing_is_not_noted():
    model = nn.ReLU()
    assert widen(model) == []
    assert rebuilt(model) == []


def test_attention_is_rebuilt_by_its_note():
    model, again = tiny.vit(), tiny.vit(seed=1)
    reparameterize_query_key(model)
    rebuild(again, rebuilt(model))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_an_unknown_name_is_refused():
    with pytest.raises(PlanishError, match=r"by 'later', which this planish does not know; it knows .*query-key"):
        rebuild(network(), [{"name": "later", "arguments": {}}])


def test_whoever_reads_files_knows_every_change():
    """In a process of its own that imports nothing but what opens a file, as `planish export` does."""
    sources = [path.read_text() for path in Path(planish.__file__).parent.rglob("*.py")]
    names = {name for text in sources for name in re.findall(r'^@rebuilder\("([^"]+)"\)', text, re.MULTILINE)}
    assert {"rms-norm", "scale-rows", "smooth-hidden", "split-outliers"} <= names
    code = "import planish.deploy.checkpoint, planish.network.rebuilding as r; print(*r._REBUILDERS)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert names <= set(found.stdout.split())
