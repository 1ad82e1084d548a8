"""Products for which ONNX Runtime has no kernel in the plain form: none is in float, or the report says so."""

import pytest
import torch
from torch import nn

import planish
from planish.deploy.onnx.lower import CONSTANT
from planish.models import Preprocessing

torch.set_num_threads(1)
LOOKS = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)


class Hard(nn.Module):
    """A key without bias, a product that meets a ReLU, a standardized weight, a table with weights, an einsum, and a
    convolution in front of a depthwise one."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.q, self.k, self.up = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.standard, self.position, self.head = nn.Linear(16, 128), nn.Linear(2, 36), nn.Linear(128, 5)
        self.places = nn.Parameter(torch.randn(36, 16))
        self.register_buffer("table", torch.randn(36, 2))

    def forward(self, images):
        x = self.stem(images).relu()
        x = (x + self.depthwise(self.mix(x))).flatten(2).transpose(1, 2)
        near = torch.einsum("bnc,mc->bnm", x, self.places)
        logits = self.q(x) @ self.k(x).transpose(-2, -1) + self.position(self.table) + near
        x = x + logits.softmax(-1) @ x
        x = nn.functional.relu(self.up(x)).square()
        weight = self.standard.weight
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return self.head(nn.functional.linear(x, weight, self.standard.bias).mean(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    quantized = planish.quantize(Hard().eval(), [images], "w4a4")
    path = tmp_path_factory.mktemp("hard") / "m.onnx"
    return planish.export(quantized, path, images=[images], preprocessing=LOOKS)


def test_every_product_is_named_and_only_the_depthwise_one_is_in_float(exported):
    kernels = {form.name: form.kernel for form in exported.forms}
    floats = {form.name: form.why for form in exported.in_float}
    assert set(floats) == {"depthwise"}
    assert "grouped convolution" in floats["depthwise"]
    assert kernels["k"] == kernels["up"] == "MatMulInteger"
    assert kernels["position"] == CONSTANT
    assert kernels["mix"] == "ConvInteger"
    assert len(kernels) == 12


def test_the_report_and_the_runtime_count_alike(exported):
    counted = exported.kernels
    assert counted["Conv"] == 1
    assert not {"MatMul", "Gemm", "Einsum", "FusedMatMul"} & set(counted)


def test_the_answers_are_those_of_the_network(exported):
    assert exported.agreement.top1 == 1
    assert exported.agreement.largest < 1e-4


def test_a_product_without_a_kernel_is_reported_as_it_runs(exported, monkeypatch, tmp_path):
    from planish.deploy.onnx import lower

    monkeypatch.setattr(lower, "_read_as_signed", lambda value: False)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    quantized = planish.quantize(Hard().eval(), [images], "w4a4")
    done = planish.export(quantized, tmp_path / "m.onnx", images=[images], preprocessing=LOOKS)
    (form,) = [form for form in done.in_float if form.name == "k"]
    assert "ONNX Runtime found no integer kernel" in form.why
    assert "in float: k: ONNX Runtime found no integer kernel" in str(done)
