"""Einsums as matrix products: the numbers of numpy, and what is left alone."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from planish.deploy.onnx.einsum import spell_out_einsums

SIDES = {"b": 2, "h": 3, "w": 4, "c": 5, "k": 6, "y": 7}


def graph_of(equation, left, right):
    operands = [
        ir.Value(name=name, shape=ir.Shape([SIDES[x] for x in term]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, term in (("a", left), ("b", right))
    ]
    node = ir.node("Einsum", operands, {"equation": equation})
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(operands, node.outputs, nodes=[node], opset_imports={"": 21}, name="g")
    return graph, ir.Model(graph, ir_version=10)


def numbers(term, seed):
    return np.random.default_rng(seed).standard_normal([SIDES[x] for x in term]).astype(np.float32)


@pytest.mark.parametrize(
    "equation",
    ["byhwc,hkc->byhwk", "byhwc,wkc->byhwk", "bwc,bck->bwk", "bcw,ck->bkw", "wc,ck", "ck,bwc->bwk", "bwc , bhc -> bhw"],
)
def test_the_product_has_the_numbers_of_the_sum(equation):
    left, right = equation.replace(" ", "").partition("->")[0].split(",")
    graph, model = graph_of(equation, left, right)
    spell_out_einsums(graph)
    kinds = [node.op_type for node in graph]
    assert "Einsum" not in kinds
    assert kinds.count("MatMul") == 1
    a, b = numbers(left, 0), numbers(right, 1)
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"a": a, "b": b})
    np.testing.assert_allclose(found, np.einsum(equation, a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("equation", ["bc,bc->b", "bwc,wc->b", "bwc,ckh->bwkh", "bb,bc->bc"])
def test_what_transposes_cannot_do_stays(equation):
    left, right = equation.partition("->")[0].split(",")
    graph, _ = graph_of(equation, left, right)
    spell_out_einsums(graph)
    assert [node.op_type for node in graph] == ["Einsum"]
