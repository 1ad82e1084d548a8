"""Graphs with ``FakeQuantize`` nodes by hand, and what ONNX Runtime computes of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from planish.deploy.onnx.graph import DOMAIN, NODE
from planish.deploy.onnx.lower import Lowering
from planish.deploy.onnx.runtime import kernels, open_session


class Build:
    """A graph with the input ``images``; nodes are added one after another and give the name of their output."""

    def __init__(self, shape):
        self.shape, self.nodes, self.constants, self.shapes = shape, [], [], {"images": shape}

    def constant(self, array, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, op, *inputs, shape=None, domain="", **attributes):
        inputs = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}{len(self.nodes)}", domain=domain,
                                           **attributes))  # fmt: skip
        if shape is not None:
            self.shapes[name] = shape
        return name

    def quantize(self, x, scale, zero=0, low=0, high=15, *, granularity="tensor", axis=-1, offset=0.0, site="", **more):
        where = x if isinstance(x, str) else self.constant(x)
        return self.node(
            NODE, where, np.asarray(scale), np.asarray(zero), domain=DOMAIN, qmin=low, qmax=high, offset=offset,
            granularity=granularity, axis=axis, group_size=0, site=site or f"s{len(self.nodes)}.input",
            shape=self.shapes.get(x) if isinstance(x, str) else list(np.shape(x)), **more,
        )  # fmt: skip

    def weight(self, values, scale, bits=4, *, granularity="channel", axis=0, site="layer.weight", offset=0.0, zero=0):
        low, high = (0, 2**bits - 1) if np.any(zero) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        scale = np.asarray(scale, np.float32)
        if granularity == "channel" and scale.ndim == 1:
            scale = scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        return self.quantize(values, scale, zero, low, high, granularity=granularity, axis=axis, site=site,
                             offset=offset)  # fmt: skip

    def model(self, output):
        def info(name, shape):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        between = [info(name, shape) for name, shape in self.shapes.items() if name not in ("images", output)]
        graph = helper.make_graph(
            self.nodes, "g", [info("images", self.shape)], [info(output, self.shapes.get(output))], self.constants,
            value_info=between,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


class Lowered:
    """A graph lowered, in ONNX Runtime."""

    def __init__(self, model, layout="small", in_float=False, exact=True):
        self.model = model.clone()
        self.lowering = Lowering(self.model.graph, layout, in_float=in_float, exact=exact)
        self.lowering.run()
        if self.lowering.has_two_bits:
            self.model.opset_imports[""] = 25
        self.model.opset_imports.pop(DOMAIN, None)
        self.proto = ir.to_proto(self.model)
        self.session = open_session(self.proto.SerializeToString())

    def __call__(self, images):
        return self.session.run(None, {"images": images})[0]

    @property
    def kernels(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            onnx.save(self.proto, path)
            return kernels(path)

    @property
    def reasons(self):
        return [form.why for form in self.lowering.forms if form.why]

    def stored(self):
        """The ONNX types of the initializers."""
        return {TensorProto.DataType.Name(t.data_type) for t in self.proto.graph.initializer if t.dims and
                np.prod(t.dims) > 16}  # fmt: skip


def plain(model):
    """What the network computes: every quantizer in float."""
    return Lowered(model, in_float=True)
