"""torch.compile of the network in training: the taps are in the graphs, and what changes anew runs without it."""

from dataclasses import replace

import pytest
import torch

from planish.flattening import FlattenSettings, flatten
from planish.qat import QATSettings, train_quantized
from planish.qat.fpq import FPQ
from tests.training import tiny

SETTINGS = tiny.settings(epochs=1, freeze_batchnorm=True)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled; they run as they are, so that nothing but the tracing is new."""
    seen, compile = [], torch.compile
    torch._dynamo.reset()

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend=backend))
    yield seen
    torch._dynamo.reset()


def close(a, b):
    for (key, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=key)


def both(make):
    return [make(replace(SETTINGS, compile=on)) for on in (False, True)]


def test_plain_training_is_one_graph_for_all_steps(graphs):
    def trained(settings):
        model = tiny.conv()
        tiny.fit(model, [], run_settings=settings)
        assert not any("_orig_mod" in key for key in model.state_dict())
        return model

    close(*both(trained))
    assert len(graphs) == 1


def test_learned_steps_are_in_the_graph(graphs):
    calibration = [tiny.data(seed=1).tensors[0]]

    def trained(settings):
        options = {"settings": QATSettings(training=settings), "calibration": calibration}
        return train_quantized(tiny.conv(), tiny.loader(), "w4a4", **options)

    close(*both(trained))
    assert 1 <= len(graphs) <= 2  # a second one only if a step moves from one kind of memory to another
    functions = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("autograd_function_apply" in name for name in functions) == 6  # three layers, weight and input


def test_outputs_that_are_kept_do_not_compile_every_step_anew(graphs):
    calibration = [tiny.data(seed=1).tensors[0]]

    def trained(settings):
        options = {"settings": QATSettings(training=settings), "calibration": calibration}
        return train_quantized(tiny.conv(), tiny.loader(), "w4a4", FPQ(p=0.0), **options)

    close(*both(trained))
    assert 1 <= len(graphs) <= 3


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_flattening_computes_its_perturbed_steps_without_it(graphs, share):
    settings = FlattenSettings(share=share, until=1.0)
    close(*both(lambda training: flatten(tiny.conv(), tiny.loader(), settings=replace(settings, training=training))))
    assert len(graphs) == (1 if share < 1 else 0)
