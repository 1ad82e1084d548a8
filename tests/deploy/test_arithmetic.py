"""Products of codes against integers multiplied one by one, ONNX Runtime, and the float product within its bound."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from planish.deploy.arithmetic import IntegerProducts, rounding_bound
from planish.deploy.coded import Coded
from planish.errors import PlanishError
from planish.scheme import Format
from tests.deploy import coding
from tests.deploy.coding import FORMATS, code, code_shifted, random

PAIRS = [("u8", "s8"), ("u4", "s4"), ("u8", "half2"), ("s3", "half8"), ("half2", "half2"), ("u4", "s3")]


@pytest.mark.parametrize(("a", "w"), PAIRS)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_layers_bit_for_bit(a, w, biased):
    x, weight = code(random(4, 9), FORMATS[a]), code(random(5, 9, seed=1), FORMATS[w])
    bias = random(5, seed=2) if biased else None
    assert torch.equal(F.linear(x, weight, bias), coding.linear(x, weight, bias))
    assert type(F.linear(x, weight, bias)) is torch.Tensor


CONVOLUTIONS = [
    {}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"groups": 4, "padding": 1},
]  # fmt: skip


@pytest.mark.parametrize(("a", "w"), PAIRS[:4])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_bit_for_bit(a, w, options):
    weight = random(4, 4 // options.get("groups", 1), 3, 3, seed=1)
    x, weight, bias = code(random(2, 4, 6, 5), FORMATS[a]), code(weight, FORMATS[w]), random(4, seed=2)
    assert torch.equal(F.conv2d(x, weight, bias, **options), coding.conv2d(x, weight, bias, **options))
    line, line_weight = x[:, :, :, 0], weight[..., 0]
    flat = coding.conv2d(x[:, :, :, :1], weight[..., :1], bias, **{k: v for k, v in options.items() if k == "groups"})
    groups = options.get("groups", 1)
    assert torch.equal(torch.conv1d(line, line_weight, bias, groups=groups), flat[..., 0])
    assert torch.equal(F.conv2d(x[0], weight, bias, **options), F.conv2d(x, weight, bias, **options)[0])


@pytest.mark.parametrize(("a", "w"), PAIRS[:4])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "stride": 2}], ids=str)
def test_transposed_convolutions_bit_for_bit(a, w, options):
    weight = code(random(4, 3, 3, 2, seed=1), FORMATS[w], axis=1)
    x, bias = code(random(2, 4, 3, 4), FORMATS[a]), random(3 * options.get("groups", 1), seed=2)
    found = F.conv_transpose2d(x, weight, bias, **options)
    assert torch.equal(found, coding.conv_transpose2d(x, weight, bias, **options))


def test_products_of_two_activations_bit_for_bit():
    x, y = code(random(2, 3, 7), FORMATS["u4"]), code(random(2, 7, 5, seed=1), FORMATS["u8"])
    twin = torch.stack([coding.linear(x[i], y[i].mT) for i in range(2)])
    added = random(2, 3, 5, seed=2)
    for found in (
        x @ y, torch.matmul(x, y), torch.bmm(x, y), x.matmul(y), torch.einsum("bik,bkj->bij", x, y),
        torch.einsum("bik, bkj -> bij", [x, y]), torch.einsum("bkj,bik->bij", y, x),
    ):  # fmt: skip
        assert torch.equal(found, twin)
    assert torch.equal(torch.mm(x[0], y[0]), twin[0])
    assert torch.equal(torch.mv(x[0], y[0, :, 1]), twin[0, :, 1])
    assert torch.equal(torch.baddbmm(added, x, y), twin + added)
    assert torch.equal(torch.addmm(added[0], x[0], y[0], beta=0.5, alpha=2), 0.5 * added[0] + 2 * twin[0])
    torch.testing.assert_close(torch.addbmm(added[0], x, y), added[0] + twin.sum(0))
    torch.testing.assert_close(torch.einsum("bik,bkj", x, y), twin.sum(0))


def test_attention_is_taken_apart():
    products = IntegerProducts()
    q, k, v = (code(random(2, 3, 5, 8, seed=i), FORMATS["u4"], site="qkv"[i], products=products) for i in range(3))
    found = F.scaled_dot_product_attention(q, k, v)
    weights = ((q @ k.mT) / 8**0.5).softmax(-1)
    torch.testing.assert_close(found, weights @ v.plain)
    assert products.notes[frozenset("qk")] == (8, "")
    assert products.notes[frozenset("v")] == (0, "an operand of it is in float")


def test_a_scale_for_each_token_is_applied_to_its_row():
    x, weight = code(random(4, 9), Format(4, "token", symmetric=False)), code(random(5, 9, seed=1), FORMATS["s4"])
    bias = random(5, seed=2)
    assert torch.equal(F.linear(x, weight, bias), coding.linear(x, weight, bias))


def test_scales_that_differ_along_the_sum_stay_in_float():
    products = IntegerProducts()
    x = code(random(2, 4, 6), FORMATS["u4"], site="x", products=products)
    value = code(random(2, 6, 5, seed=1), Format(4, "token", symmetric=False), site="value", products=products)
    assert torch.equal(x @ value, x.plain @ value.plain)
    assert products.notes == {frozenset({"x", "value"}): (6, "the scales of value differ along the sum")}


@pytest.mark.parametrize("a", ["u8", "u4"])
def test_groups_are_scaled_one_by_one(a):
    x = code(random(4, 12), FORMATS[a])
    weight = code(random(5, 12, seed=1), Format(4, "group", group_size=4))
    bias = random(5, seed=2)
    twin = sum(coding.linear(x[:, i : i + 4], weight[:, i : i + 4]) for i in (0, 4, 8))
    assert torch.equal(F.linear(x, weight, bias), twin + bias)
    # of a convolution the groups go through the flattened kernel; the twin takes one convolution apart into patches
    image, kernel = (
        code(random(2, 4, 5, 5), FORMATS[a]),
        code(random(6, 2, 3, 2, seed=1), Format(4, "group", group_size=3)),
    )
    patches = F.unfold(image.plain, (3, 2), padding=1).unflatten(1, (2, -1))
    exact = torch.einsum("ngkl,gok->ngol", patches.double(), kernel.plain.double().reshape(2, 3, -1)).flatten(1, 2)
    found = F.conv2d(image, kernel, padding=1, groups=2)
    torch.testing.assert_close(found.flatten(2).double(), exact, rtol=1e-5, atol=1e-5)


def test_shifts_around_a_grid_go_through_the_float_bias():
    before, after = random(9) / 3, random(9, seed=1)
    x = code_shifted(random(4, 9, seed=2), FORMATS["u4"], before, after)
    weight, bias = code(random(5, 9, seed=3), FORMATS["s4"]), random(5, seed=4)
    torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x.plain, weight.plain, bias))
    # padding adds the value 0, which the shift does not change
    after = random(4, 1, 1)
    image = code_shifted(random(2, 4, 5, 5), FORMATS["u4"], after / 2, after)
    kernel = code(random(6, 2, 3, 3, seed=1), FORMATS["s4"])
    found, expected = (F.conv2d(*pair, groups=2, padding=1) for pair in ((image, kernel), (image.plain, kernel.plain)))
    torch.testing.assert_close(found, expected)
    # two shifted operands, as of an attention
    key = code_shifted(random(7, 9, seed=5), FORMATS["u4"], before, after.reshape(-1)[:1])
    torch.testing.assert_close(x @ key.T, x.plain @ key.plain.T)


def test_double_and_half_precision():
    x, weight = code(random(4, 9).double(), FORMATS["u8"]), code(random(5, 9, seed=1).double(), FORMATS["s8"])
    torch.testing.assert_close(F.linear(x, weight), F.linear(x.plain, weight.plain), rtol=1e-7, atol=1e-7)
    x, weight = code(random(4, 9).half(), FORMATS["u8"]), code(random(5, 9, seed=1).half(), FORMATS["s8"])
    assert F.linear(x, weight).dtype == torch.float16
    torch.testing.assert_close(F.linear(x, weight), F.linear(x.plain, weight.plain), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("depth", "fits"), [(33_025, True), (33_026, False)])
def test_sums_that_do_not_fit_in_32_bits_are_refused(depth, fits):
    coded = code(torch.tensor([[-1.0] * depth]), Format(8, symmetric=False, observer="minmax"))
    coded.codes.zero_()
    coded.zero_point = torch.full_like(coded.zero_point, 255)
    if fits:
        assert float(coded.steps.double().square().sum()) == 33_025 * 255**2 <= 2**31 - 1
        F.linear(coded, coded)
    else:
        with pytest.raises(
            PlanishError, match=r"a sum over 33,026 products of its codes does not fit in 32 bits; give"
        ):
            F.linear(coded, coded)


# against ONNX Runtime, on the same codes


def onnxruntime_run(operator, domain, inputs, output, **attributes):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    kinds = {np.dtype("uint8"): 2, np.dtype("int8"): 3, np.dtype("float32"): 1}
    infos = [onnx.helper.make_tensor_value_info(n, kinds[v.dtype], v.shape) for n, v in inputs.items()]
    node = onnx.helper.make_node(operator, list(inputs), ["y"], domain=domain, **attributes)
    graph = onnx.helper.make_graph([node], "g", infos, [onnx.helper.make_tensor_value_info("y", output, None)])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, inputs)[0])


@pytest.mark.parametrize(("a", "w"), [("u8", "s8"), ("u4", "s4"), ("u8", "s3")])
@pytest.mark.parametrize("depth", [9, 192, 700])
def test_onnxruntime_matmul_integer_to_float_gives_the_same_bits(a, w, depth):
    x, weight = code(random(50, depth), FORMATS[a]), code(random(33, depth, seed=1), FORMATS[w])
    bias, scales = random(33, seed=2), weight.scale[:, 0].contiguous()
    inputs = {"a": x.codes.numpy(), "w": weight.codes.T.contiguous().numpy()}
    zero = {"az": np.array(int(x.zero_point[0, 0]), np.uint8)}
    acc = onnxruntime_run("MatMulInteger", "", inputs | zero, 6)
    assert torch.equal(acc, (x.steps.double() @ weight.steps.T.double()).int())
    more = {"sa": x.scale[0, :1].contiguous().numpy(), "sw": scales.numpy(), **zero, "wz": np.zeros(33, np.int8)}
    found = onnxruntime_run("MatMulIntegerToFloat", "com.microsoft", inputs | more | {"b": bias.numpy()}, 1)
    assert torch.equal(F.linear(x, weight, bias), found)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("a", ["u8", "u4"])
def test_onnxruntime_conv_integer_gives_the_same_sums(a, options):
    groups, p, d = options.get("groups", 1), options.get("padding", 0), options.get("dilation", 1)
    weight = code(random(8, 8 // groups, 3, 3, seed=1), FORMATS["s4"])
    x = code(random(2, 8, 9, 7), FORMATS[a])
    inputs = {"x": x.codes.numpy(), "w": weight.codes.numpy(), "xz": np.array(int(x.zero_point.flatten()[0]), np.uint8)}
    attributes = {"group": groups, "pads": [p] * 4, "dilations": [d] * 2, "strides": [options.get("stride", 1)] * 2}
    acc = onnxruntime_run("ConvInteger", "", inputs, 6, **attributes)
    found = F.conv2d(x, weight, **options)
    scale = x.scale[0, 0, 0, 0] * weight.scale[:, 0, 0, 0].reshape(-1, 1, 1)
    assert torch.equal(found, acc.float() * scale)


# against the float product


@pytest.mark.parametrize(("a", "w"), PAIRS)
@pytest.mark.parametrize("depth", [3, 64, 3072])
def test_the_float_product_is_within_the_bound(a, w, depth):
    x, weight, bias = (
        code(random(20, depth), FORMATS[a]),
        code(random(30, depth, seed=1), FORMATS[w]),
        random(30, seed=2),
    )
    difference = F.linear(x, weight, bias).double() - F.linear(x.plain, weight.plain, bias).double()
    size = x.plain.double().abs() @ weight.plain.double().abs().T + bias.abs()
    assert (difference.abs() <= rounding_bound(depth) * size).all()


def test_the_bound_is_no_exaggeration():
    """The float product does come within three orders of magnitude of it, and it is far below a step of 8 bits."""
    x, weight = code(random(200, 64), FORMATS["u8"]), code(random(200, 64, seed=1), FORMATS["s8"])
    exact = x.plain.double() @ weight.plain.double().T
    size = x.plain.double().abs() @ weight.plain.double().abs().T
    ratio = ((F.linear(x, weight) - (x.plain @ weight.plain.T)).abs() / (rounding_bound(64) * size)).max()
    assert 1e-3 < ratio < 1
    assert rounding_bound(64) * size.max() < 2e-3 * (exact.max() - exact.min()) / 255
    assert rounding_bound(10) == pytest.approx(17 * 2.0**-24, rel=1e-5)
    assert isinstance(x, Coded)
