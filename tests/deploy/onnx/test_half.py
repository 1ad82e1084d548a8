"""Constants in half precision: what is rounded, what stays, and what the file then says."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from planish.deploy.checkpoint import load, save
from planish.deploy.onnx.export import export
from planish.deploy.onnx.runtime import open_session
from planish.errors import PlanishError
from planish.network.half import LEAST, round_constants
from planish.ptq import Calibrate, FoldBatchNorm, HalveConstants, Round, quantize
from tests.deploy.tiny import LOOKS, RECIPES, network

torch.set_num_threads(1)
INTEGERS = (TensorProto.INT4, TensorProto.INT8, TensorProto.UINT8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each network quantized, its images, and what was exported with constants in float and in half precision."""
    made, folder = {}, tmp_path_factory.mktemp("files")
    for name in RECIPES:
        given, images = network(name)
        model = quantize(given, [images], "w4a4")
        done = {
            kind: export(model, folder / f"{name}-{kind}.onnx", images=[images], preprocessing=LOOKS, constants=kind)
            for kind in ("float", "half")
        }
        made[name] = model, images, done
    return made


def initializers(exported):
    return {tensor.name: tensor for tensor in onnx.load(exported.path).graph.initializer}


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_computes_the_rounded_network(files, name):
    model, images, done = files[name]
    twin = copy.deepcopy(model)
    changed = round_constants(twin, twin.planish_assignment)
    with torch.no_grad():
        expected = twin(images).numpy()
        given = model(images).numpy()
    found = open_session(done["half"].path).run(None, {"images": images.numpy()})[0]
    assert np.median(np.abs(found - expected)) < 1e-5
    assert np.median(np.abs(found - given)) > 1e-5  # it is another network, and the report says so
    assert changed == done["half"].halved > 0
    assert f"{changed} tensors beside the codes were rounded to half precision" in str(done["half"])
    assert "half precision" not in str(done["float"])


@pytest.mark.parametrize("name", RECIPES)
def test_codes_and_kernels_stay_and_the_file_is_smaller(files, name):
    _, _, done = files[name]
    before, after = (
        sorted((t.data_type, tuple(t.dims), t.SerializeToString(deterministic=True)) for t in found.values()
               if t.data_type in INTEGERS and np.prod(t.dims) > LEAST)
        for found in (initializers(done["float"]), initializers(done["half"]))
    )  # fmt: skip
    assert before
    assert before == after
    assert done["half"].kernels == done["float"].kernels
    if name == "vit":  # of convolutions constants are products of two scales, and few
        assert done["half"].bytes < done["float"].bytes


def test_what_half_precision_holds_is_stored_in_it(files):
    found = initializers(files["vit"][2]["half"]).values()
    narrow = [t for t in found if t.data_type == TensorProto.FLOAT16]
    assert any("scale" in t.name for t in narrow)
    assert any("bias" in t.name for t in narrow)
    for tensor in found:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= LEAST:
            values = numpy_helper.to_array(tensor)
            assert not np.array_equal(values.astype(np.float16).astype(np.float32), values), tensor.name


def test_openvino_reads_it(files):
    openvino = pytest.importorskip("openvino")
    _, images, done = files["vit"]
    ours = open_session(done["half"].path).run(None, {"images": images.numpy()})[0]
    compiled = openvino.Core().compile_model(done["half"].path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.median(np.abs(ours - compiled(images.numpy())[0])) < 1e-3


@pytest.mark.parametrize("name", RECIPES)
def test_a_network_that_was_quantized_so_is_exported_as_it_is(name, tmp_path):
    model, images = network(name)
    model = quantize(model, [images], "w4a4", [FoldBatchNorm(), Calibrate(), Round(), HalveConstants()])
    save(model, tmp_path / "m.safetensors", recipe=RECIPES[name], preprocessing=LOOKS)
    model = load(tmp_path / "m.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = export(model, tmp_path / "m.onnx", images=[images], preprocessing=LOOKS, constants="half")
    assert done.halved == 0
    assert done.agreement.largest < 1e-4
    assert "half precision" not in str(done)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_network_in_float_becomes_half_as_large(tmp_path):
    model, images = network("vit")
    sizes = [
        export(model, tmp_path / f"{kind}.onnx", images=[images], preprocessing=LOOKS, constants=kind).bytes
        for kind in ("float", "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_an_unknown_choice_is_refused(files, tmp_path):
    with pytest.raises(PlanishError, match="constants is 'double': choose one of float, half"):
        export(files["vit"][0], tmp_path / "m.onnx", preprocessing=LOOKS, constants="double")
