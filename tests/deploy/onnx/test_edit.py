"""The tools that edit a graph."""

from __future__ import annotations

import numpy as np

from planish.deploy.onnx.edit import Editor, attribute, constant, only_user
from tests.deploy.onnx_graphs import Build


def graph_of_two():
    build = Build([2])
    build.node("Exp", build.node("Neg", "images"))
    model = build.model("v1")
    return model, model.graph, list(model.graph)


def test_names_are_free_and_equal_constants_are_one():
    _, graph, _ = graph_of_two()
    editor = Editor(graph)
    assert (editor.name("v0"), editor.name("images"), editor.name("new"), editor.name("new")) == (
        "v0_1", "images_1", "new", "new_1",
    )  # fmt: skip
    one = editor.constant(np.float32([1, 2]), "a")
    assert editor.constant(np.float32([1, 2]), "b") is one
    others = [np.float32([[1, 2]]), np.float64([1, 2]), np.int32([1, 2]), np.float32([1, 3])]
    assert len({id(editor.constant(other, "a")) for other in others} | {id(one)}) == 5
    np.testing.assert_array_equal(constant(one), [1, 2])
    assert constant(graph.inputs[0]) is None
    assert constant(None) is None


def test_replacing_keeps_the_name_of_an_output_and_removing_takes_what_only_it_needed():
    _, graph, (neg, exp) = graph_of_two()
    editor = Editor(graph)
    new = editor.node(exp, "Abs", [graph.inputs[0]], name="abs", like=exp.outputs[0])
    editor.replace(exp.outputs[0], new)
    assert graph.outputs[0] is new
    assert new.name == "v1"
    editor.remove(exp)
    assert [node.op_type for node in graph] == ["Abs"]
    assert neg.graph is None


def test_users_and_attributes():
    _, graph, (neg, exp) = graph_of_two()
    assert only_user(neg.outputs[0]) is exp
    assert only_user(exp.outputs[0]) is None
    assert attribute(exp, "axis", 3) == 3
    editor = Editor(graph)
    editor.node(exp, "Abs", [neg.outputs[0]], name="abs")
    assert only_user(neg.outputs[0]) is None
    editor.sweep()
    assert only_user(neg.outputs[0]) is exp
