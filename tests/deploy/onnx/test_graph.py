"""One node a quantizer, and one sentence where a model cannot be exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planish.deploy.onnx.graph import network_graph
from planish.deploy.onnx.operands import operand_of
from planish.deploy.onnx.outputs import open_outputs, ranges
from planish.deploy.onnx.tidy import quantizers, tidy
from planish.errors import PlanishError
from planish.network import taps_of
from planish.network.taps import replace_tap
from planish.ptq import quantize
from tests.deploy.tiny import network


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_node_a_quantizer_which_operands_and_outputs_find(name):
    model, images = network(name)
    model = quantize(model, [images], "w4a4").train()
    graph = network_graph(model, images[:1])
    assert model.training
    sites = [node.attributes["site"].as_string() for node in quantizers(graph.graph)]
    assert sorted(sites) == sorted(site for site, _ in taps_of(model))
    assert graph.graph.inputs[0].name == "images"
    assert not isinstance(graph.graph.inputs[0].shape[0], int)
    tidy(graph.graph)
    for node in graph.graph:
        if node.op_type in ("Conv", "MatMul"):
            left, right = map(operand_of, node.inputs[:2])
            assert left is not None
            assert right is not None
            assert left.product == right.product or right.weight is None
    found = open_outputs(graph.graph)
    # the patches go into a sum with the positions; a residual network has sums that no quantizer follows
    assert len(found) >= (1 if name == "vit" else 3)
    ends = ranges(graph, found, [images.numpy()])
    assert all(low <= 0 <= high for low, high in ends)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_exported_gives_one_sentence():
    with pytest.raises(PlanishError, match="Branching cannot be exported to ONNX: ") as caught:
        network_graph(Branching(), torch.zeros(2, 1, 4, 4))
    assert "\n" not in str(caught.value)


def test_taps_that_are_no_quantizers_are_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    quantized = quantize(model, [torch.randn(2, 1, 2, 2)], "w4a4")
    site, _ = next(quantized.planish_assignment.quantized())
    replace_tap(quantized, site, nn.Identity())
    with pytest.raises(PlanishError, match="Identity"):
        network_graph(quantized, torch.randn(2, 1, 2, 2))
