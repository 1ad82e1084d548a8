"""The walk through one file and its test: both are taken from the page and run."""

import sys
import types

import torch

from tests.docs.blocks import python


def module(name, source, monkeypatch):
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(source, name, "exec"), made.__dict__)
    return made


def test_the_file_and_its_test(monkeypatch):
    torch.set_num_threads(1)
    source, tests = python("adding-a-method.md")
    module("planish.ptq.refit", source, monkeypatch)
    found = module("test_refit", tests, monkeypatch)
    names = [name for name in vars(found) if name.startswith("test_")]
    assert len(names) == 5
    for name in names:
        getattr(found, name)()


def test_the_test_sees_a_wrong_factor(monkeypatch):
    source, tests = python("adding-a-method.md")
    assert "grid.scale * factor" in source
    module("planish.ptq.refit", source.replace("grid.scale * factor", "grid.scale / factor"), monkeypatch)
    found = module("test_refit", tests, monkeypatch)
    failed = []
    for name in [name for name in vars(found) if name.startswith("test_")]:
        try:
            getattr(found, name)()
        except AssertionError:
            failed.append(name)
    assert failed == ["test_as_the_formula_says", "test_the_error_only_falls", "test_in_a_list_of_passes"]
