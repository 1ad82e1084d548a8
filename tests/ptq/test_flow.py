"""Cached inputs and outputs of units against those that hooks see when the whole networks run."""

import copy
from pathlib import Path

import pytest
import timm
import torch

from planish.network import assign, detach, watch
from planish.network.units import find_units, join_units
from planish.ptq import Calibrate, Calibration, FoldBatchNorm, Round
from planish.ptq.flow import Flow, Suffix
from planish.ptq.shelf import Shelf
from tests.training import tiny

torch.set_num_threads(1)


def networks(model, size, scheme="w4a4"):
    batches = [torch.randn(5, 1, size, size), torch.randn(3, 1, size, size)]
    model = model.eval().requires_grad_(False)
    work = Calibration(model, batches, assign(watch(model, batches[0][:1]), scheme), [])
    for step in (FoldBatchNorm(), Calibrate(), Round()):
        step(work)
    teacher = copy.deepcopy(model)
    detach(teacher)
    return model, teacher, find_units(teacher, batches[0][:1], work.assignment.products), batches


MODELS = {
    "conv": lambda: networks(tiny.conv(), 8),
    "vit": lambda: networks(tiny.vit(), 16),
    "resnet": lambda: networks(timm.create_model("test_resnet", in_chans=1, num_classes=4), 16),
    "levit": lambda: networks(timm.create_model("levit_128s", in_chans=1, num_classes=4), 224),  # units without a link
}


def seen(model, path, batches):
    """What a module gets and gives when the whole network runs."""
    inputs, outputs = [], []
    module = model.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(lambda m, args: inputs.append(args[0])),
        module.register_forward_hook(lambda m, args, out: outputs.append(out)),
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_targets_are_those_of_the_whole_networks(name):
    torch.manual_seed(0)
    student, teacher, units, batches = MODELS[name]()
    flow = Flow(student, teacher, units, batches, Shelf(1e9))
    indices = range(len(units)) if name != "levit" else (0, 1, len(units) - 2, len(units) - 1)
    for index in range(len(units)):
        data = flow.data(index)
        if index in indices:
            torch.testing.assert_close(data.quantized, seen(student, units[index].path, batches)[0])
            exact, target = seen(teacher, units[index].path, batches)
            torch.testing.assert_close(data.exact, exact)
            torch.testing.assert_close(data.target, target)
        flow.advance(index, data)


@pytest.mark.parametrize("name", ["conv", "vit", "resnet"])
def test_a_suffix_gives_the_logits_and_the_features(name):
    torch.manual_seed(0)
    student, teacher, units, batches = MODELS[name]()
    flow = Flow(student, teacher, units, batches, Shelf(1e9))
    last = units[-1].path
    features, logits = seen(teacher, last, batches)
    for index, unit in enumerate(units):
        _, outputs = seen(teacher, unit.path, batches)
        suffix = Suffix(flow, index, last, logits, features)
        torch.testing.assert_close(suffix.logits(outputs), torch.cat([teacher(batch) for batch in batches]))
        if unit.path != last:
            torch.testing.assert_close(suffix.features(outputs), features)
        outputs = outputs[:2].requires_grad_()
        (gradient,) = torch.autograd.grad(suffix.logits(outputs).square().sum(), outputs)
        assert gradient.abs().sum() > 0
    assert not any("forward" in module.__dict__ for module in teacher.modules())


@pytest.mark.parametrize("name", ["conv", "vit", "resnet"])
def test_joined_units_are_run_from_the_first_to_the_last(name):
    torch.manual_seed(0)
    student, teacher, units, batches = MODELS[name]()
    products = watch(teacher, batches[0][:1]).products
    joined = join_units(units, products, 2)
    assert max(len(unit.before) for unit in joined) >= 1
    flow = Flow(student, teacher, joined, batches, Shelf(1e9))
    features, logits = seen(teacher, units[-1].path, batches)
    for index, unit in enumerate(joined):
        data = flow.data(index)
        torch.testing.assert_close(data.quantized, seen(student, unit.first, batches)[0])
        torch.testing.assert_close(data.target, seen(teacher, unit.path, batches)[1])
        torch.testing.assert_close(flow.run("student", index, data.quantized), seen(student, unit.path, batches)[1])
        torch.testing.assert_close(Suffix(flow, index, units[-1].path, logits, features).logits(data.target), logits)
        flow.advance(index, data)


def test_what_does_not_fit_into_memory_goes_into_files(tmp_path):
    found = []
    for memory in (1e9, 0):
        torch.manual_seed(0)
        student, teacher, units, batches = MODELS["vit"]()
        shelf = Shelf(memory, tmp_path)
        flow = Flow(student, teacher, units, batches, shelf)
        most = 0
        for index in range(len(units)):
            data = flow.data(index)
            most = max(most, len(list(Path(shelf._folder.name).iterdir())))
            found.append((memory, index, data.quantized.clone(), data.target.clone()))
            flow.advance(index, data)
        assert most == (0 if memory else 5)  # three of this unit, two from the one before
        assert shelf.held == (2 * 8 * 4 * 4 if memory else 0)  # the logits of both networks are still there
        shelf.close()
        assert not list(tmp_path.iterdir())
    half = len(found) // 2
    for (_, i, a, b), (_, j, c, d) in zip(found[:half], found[half:], strict=True):
        assert i == j
        assert torch.equal(a, c)
        assert torch.equal(b, d)
