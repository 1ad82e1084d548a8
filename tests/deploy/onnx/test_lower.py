"""Each form of a product: what it computes, on which kernel, how its weight is stored, or why it stays in float."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.deploy.onnx_graphs import Build, Lowered, plain

RANDOM = np.random.default_rng


def grid(x, scale, zero, low, high, offset=0.0):
    """Values on a grid, from float32 arithmetic, as float64."""
    scale = np.float32(scale)
    steps = np.clip(np.rint(x / scale - np.float32(offset)) + zero, low, high)
    return torch.from_numpy(((steps - zero + offset) * scale.astype(np.float64)).astype(np.float64))


def images(*shape, seed=0):
    return RANDOM(seed).standard_normal(shape).astype(np.float32)


def some_scales(count, seed=1, size=0.3):
    return (size * RANDOM(seed).uniform(0.5, 1, count)).astype(np.float32)


def conv(bits, *, after=True, zero=6, groups=1, layout="small", bias=True, out_bits=4, weight_bits=None, **more):
    """A convolution in a graph and in float64: (graph, input, its output or codes of its output as values)."""
    build, x = Build(["n", 4, 9, 9]), images(5, 4, 9, 9)
    w, b = images(8, 4 // groups, 3, 3, seed=2), images(8, seed=3) if bias else None
    weight_bits = weight_bits or bits
    scales, top = some_scales(8, size=2.0 ** (2 - weight_bits)), 2**bits - 1
    step = 4.0 / top
    q = build.quantize("images", step, zero, 0, top)
    inputs = [q, build.weight(w, scales, weight_bits, site="conv.weight"), *([b] if bias else [])]
    out = build.node("Conv", *inputs, pads=[1, 1, 1, 1], group=groups, shape=["n", 8, 9, 9], **more)
    values = F.conv2d(grid(x, step, zero, 0, top),
                      grid(w, scales.reshape(-1, 1, 1, 1), 0, -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1),
                      None if b is None else torch.from_numpy(b).double(), padding=1, groups=groups)  # fmt: skip
    if after:
        high = 2**out_bits - 1
        out = build.quantize(out, 0.71, high // 3, 0, high)
        values = grid(values.numpy(), 0.71, high // 3, 0, high)
    return build.model(out), x, values.numpy()


@pytest.mark.parametrize("layout", ["small", "fast"])
@pytest.mark.parametrize(("bits", "kind"), [(2, "INT2"), (3, "INT4"), (4, "INT4")])
def test_convolution_to_codes_is_exact_to_the_last_code(bits, kind, layout):
    model, x, values = conv(bits, zero=1, out_bits=bits)
    lowered = Lowered(model, layout)
    # the scales are random, so that no sum lies on a boundary; where one did, the even code would be right
    np.testing.assert_array_equal(np.rint(lowered(x) / 0.71), np.rint(values / 0.71))
    assert lowered.kernels["QLinearConv"] == 1
    assert not lowered.kernels["Conv"]
    assert [form.inexact_channels for form in lowered.lowering.forms] == [0]
    assert lowered.stored() == ({kind} if layout == "small" else {"INT8"})
    size = 8 * 4 * 9 * (1 if layout == "fast" else 0.25 if bits == 2 else 0.5)
    assert lowered.lowering.weights == {"conv.weight": (size, 4 * 8 * 4 * 9)}
    assert lowered.model.opset_imports[""] == (25 if (bits, layout) == (2, "small") else 21)


@pytest.mark.parametrize("layout", ["small", "fast"])
@pytest.mark.parametrize(("bits", "zero"), [(8, 100), (4, 6), (2, 1)])
def test_convolution_with_float_output(bits, zero, layout):
    model, x, values = conv(bits, after=False, zero=zero)
    lowered = Lowered(model, layout)
    np.testing.assert_allclose(lowered(x), values, rtol=3e-6, atol=1e-5)
    assert lowered.kernels["ConvInteger"] == 1
    assert not lowered.kernels["Conv"]


def test_eight_bit_output_is_not_exact_and_so_stays_in_float():
    model, x, values = conv(8, zero=100, out_bits=8)
    lowered = Lowered(model)
    assert lowered.kernels["ConvInteger"] == 1
    assert np.mean(np.abs(lowered(x) - values) > 1e-3) < 1e-3


def test_a_file_that_need_not_be_exact_takes_the_fast_kernel():
    model, x, values = conv(8, zero=100, out_bits=8)
    lowered = Lowered(model, exact=False)
    assert lowered.kernels["QLinearConv"] == 1
    assert lowered.lowering.forms[0].inexact_channels
    assert np.mean(np.abs(lowered(x) - values) > 1e-3) < 5e-2  # one code


def test_depthwise_to_codes():
    model, x, values = conv(4, groups=4)
    lowered = Lowered(model)
    assert np.mean(np.abs(lowered(x) - values) > 1e-3) < 2e-2  # channels that are not exact are counted
    assert lowered.kernels["QLinearConv"] == 1
    assert "Conv" not in lowered.kernels
    form = lowered.lowering.forms[0]
    if not form.inexact_channels:
        np.testing.assert_allclose(lowered(x), values, atol=1e-5)


def test_grouped_convolution_with_float_output_says_why():
    model, x, values = conv(4, groups=2, after=False)
    lowered = Lowered(model)
    np.testing.assert_allclose(lowered(x), values, rtol=1e-5, atol=2e-5)
    assert lowered.reasons == ["a grouped convolution whose output is needed in float has no integer kernel"]


def test_a_channel_of_zeros_and_a_bias_that_does_not_fit():
    for weight, kernel in ((0.0, "QLinearConv"), (1e-6, "ConvInteger")):
        build, x = Build(["n", 2, 5, 5]), images(3, 2, 5, 5)
        w, b = np.full((2, 2, 1, 1), weight, np.float32), np.float32([0.9, -3])
        q = build.quantize("images", 0.3, 7)
        scale = np.float32([1e-12, 1e-12]) if weight == 0 else np.float32([2e-7, 1e-11])
        out = build.node("Conv", q, build.weight(w, scale), b, shape=["n", 2, 5, 5])
        model = build.model(build.quantize(out, 0.5, 7))
        lowered = Lowered(model)
        np.testing.assert_array_equal(lowered(x), plain(model)(x))
        assert lowered.kernels[kernel] == 1


def test_transposed_convolution_affine_group_and_half_integers_of_eight_bits_say_why():
    x, w = images(2, 4, 6, 6), images(4, 4, 3, 3, seed=2)
    cases = {
        "there is no integer kernel for transposed convolutions": ("ConvTranspose", {}),
        "layer.weight has a zero point; integer kernels want symmetric weights": ("Conv", {"zero": np.float32(3)}),
        "layer.weight has scales along its inputs (per group), which no kernel sums over": (
            "Conv", {"granularity": "group", "scale": np.broadcast_to(some_scales(9).reshape(1, 1, 3, 3), w.shape)},
        ),
        "layer.weight has half-integer levels of 8 bits, which do not fit in a byte": (
            "Conv", {"offset": 0.5, "bits": 8, "scale": some_scales(4, size=0.02)}),
    }  # fmt: skip
    for why, (op, more) in cases.items():
        build = Build(["n", 4, 6, 6])
        more = {"scale": some_scales(4), **more}
        q = build.quantize("images", 0.3, 7)
        out = build.node(op, q, build.weight(w, **more), shape=["n", 4, 4, 4])
        # a quantizer behind it: ONNX Runtime would then quantize the float weight to eight bits by itself
        model = build.model(build.quantize(out, 0.02, 100, 0, 255))
        lowered = Lowered(model)
        assert lowered.reasons == [why]
        assert not lowered.kernels["QLinearConv"]
        difference = np.abs(lowered(x) - plain(model)(x))
        assert (difference > 1e-4).mean() < 1e-2


def test_activations_per_token_and_shifted_outside_their_levels_stay_in_float():
    x, w = images(2, 5, 8), images(8, 6, seed=2)
    for scale, zero, kind in ((some_scales(5).reshape(5, 1), 7, "token"), (np.float32(0.2), 40, "tensor")):
        build = Build(["n", 5, 8])
        q = build.quantize("images", scale, zero, granularity=kind, axis=-2)
        out = build.node("MatMul", q, build.weight(w, some_scales(6), axis=1), shape=["n", 5, 6])
        lowered = Lowered(build.model(out))
        assert "s" in lowered.reasons[0]
        assert "grid per" in lowered.reasons[0]
        values = grid(x, scale, zero, 0, 15) @ grid(w, some_scales(6), 0, -8, 7)
        np.testing.assert_allclose(lowered(x), values, rtol=1e-5, atol=1e-5)


def test_weights_alone_are_quantized():
    x, w = images(2, 5, 8), images(8, 6, seed=2)
    build = Build(["n", 5, 8])
    lowered = Lowered(build.model(build.node("MatMul", "images", build.weight(w, some_scales(6), axis=1))))
    assert lowered.reasons == ["its first operand is not quantized next to it"]
    np.testing.assert_allclose(lowered(x), x.astype(np.float64) @ grid(w, some_scales(6), 0, -8, 7).numpy(), atol=1e-5)


@pytest.mark.parametrize("layout", ["small", "fast"])
@pytest.mark.parametrize(("bits", "offset"), [(2, 0.5), (2, 0), (3, 0), (4, 0.5), (4, 0), (8, 0)])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_product_with_a_weight(bits, offset, rank, transposed, layout):
    lead = ["n"] if rank == 2 else ["n", 5]
    build, x = Build([*lead, 16]), images(*((3,) if rank == 2 else (3, 5)), 16)
    w = images(16, 7, seed=2)
    scales, low, high = some_scales(7, size=2.0 ** (2 - bits)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = build.quantize("images", 0.4, -1, -8, 7)  # signed codes
    if transposed:
        stored = build.weight(np.ascontiguousarray(w.T), scales, bits, offset=offset)
        stored = build.node("Transpose", stored, perm=[1, 0], shape=[16, 7])
    else:
        stored = build.weight(w, scales, bits, axis=1, offset=offset)
    out = build.node("Add", build.node("MatMul", q, stored, shape=[*lead, 7]), images(7), shape=[*lead, 7])
    lowered = Lowered(build.model(out), layout)
    values = grid(x, 0.4, -1, -8, 7) @ grid(w, scales, 0, low, high, offset) + torch.from_numpy(images(7)).double()
    np.testing.assert_allclose(lowered(x), values, rtol=3e-6, atol=1e-5)
    assert lowered.kernels["MatMulInteger" if rank == 2 else "MatMulIntegerToFloat"] == 1
    assert not {"MatMul", "Gemm", "FusedGemm"} & set(lowered.kernels)
    assert lowered.lowering.forms[0].kernel == ("MatMulInteger" if rank == 2 else "MatMulIntegerToFloat")
    assert lowered.stored() == {{2: "INT2", 8: "INT8"}.get(bits, "INT4") if layout == "small" else "INT8"}
    assert not lowered.reasons


def test_a_product_of_unknown_rank_is_on_integers_too():
    build, x, w = Build(["n", 16]), images(3, 16), images(16, 7, seed=2)
    q = build.quantize(build.node("Neg", "images"), 0.4, 7)
    model = build.model(build.node("MatMul", q, build.weight(w, some_scales(7), axis=1), shape=["n", 7]))
    lowered = Lowered(model)
    np.testing.assert_allclose(lowered(x), plain(model)(x), rtol=1e-5, atol=1e-5)
    assert not {"MatMul", "Gemm"} & set(lowered.kernels)


def test_weight_with_one_scale_as_it_stands():
    build, x, w = Build(["n", 16]), images(3, 16), images(16, 7, seed=2)
    q = build.quantize("images", 0.4, 7)
    out = build.node("MatMul", q, build.weight(w, np.float32(0.2), granularity="tensor"), shape=["n", 7])
    values = grid(x, 0.4, 7, 0, 15) @ grid(w, 0.2, 0, -8, 7)
    np.testing.assert_allclose(Lowered(build.model(out))(x), values, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize(("low", "high", "zero"), [(0, 15, 6), (-8, 7, 0), (0, 255, 130), (0, 3, 0)])
def test_product_of_two_activations(low, high, zero):
    build, x = Build(["n", 3, 5, 8]), images(2, 3, 5, 8)
    step = 4.0 / (high - low)
    left = build.quantize("images", step, zero, low, high, site="attn.matmul_left")
    right = build.quantize(build.node("Neg", "images"), step, zero, low, high, site="attn.matmul_right")
    right = build.node("Transpose", right, perm=[0, 1, 3, 2], shape=["n", 3, 8, 5])
    lowered = Lowered(build.model(build.node("MatMul", left, right, shape=["n", 3, 5, 5])))
    a, b = grid(x, step, zero, low, high), grid(-x, step, zero, low, high)
    np.testing.assert_allclose(lowered(x), a @ b.transpose(-1, -2), rtol=3e-6, atol=1e-5)
    assert lowered.kernels["MatMulIntegerToFloat"] == 1
    assert lowered.lowering.forms[0].name == "attn.matmul"


@pytest.mark.parametrize(("zero", "integer"), [(0, True), (6, True), ((0, 6, 0), False), (40, False)])
def test_product_of_two_activations_with_a_scale_for_each_head(zero, integer):
    build, x = Build(["n", 3, 5, 8]), images(2, 3, 5, 8)
    steps = some_scales(3).reshape(1, 3, 1, 1)
    zeros = np.broadcast_to(np.float32(zero).reshape(1, -1, 1, 1), steps.shape)
    left = build.quantize("images", steps, zeros, granularity="channel", axis=1, site="attn.matmul_left")
    right = build.quantize(build.node("Neg", "images"), 0.3, 7, site="attn.matmul_right")
    right = build.node("Transpose", right, perm=[0, 1, 3, 2], shape=["n", 3, 8, 5])
    lowered = Lowered(build.model(build.node("MatMul", left, right, shape=["n", 3, 5, 5])))
    a, b = grid(x, steps, zeros, 0, 15), grid(-x, 0.3, 7, 0, 15)
    np.testing.assert_allclose(lowered(x), a @ b.transpose(-1, -2), rtol=3e-6, atol=1e-5)
    assert lowered.kernels["MatMulInteger"] == integer
    assert [("grid per channel" in why) for why in lowered.reasons] == ([] if integer else [True])


def test_pooling_and_moves_between_the_quantizer_and_its_product():
    build, x, w = Build(["n", 2, 8, 8]), images(3, 2, 8, 8), images(5, 32, seed=2)
    q = build.quantize("images", 0.3, 7)
    pooled = build.node("MaxPool", q, kernel_shape=[2, 2], strides=[2, 2], shape=["n", 2, 4, 4])
    flat = build.node("Flatten", pooled, axis=1, shape=["n", 32])
    weight = build.node("Transpose", build.weight(w, some_scales(5)), perm=[1, 0], shape=[32, 5])
    model = build.model(build.node("MatMul", flat, weight, shape=["n", 5]))
    lowered = Lowered(model)
    np.testing.assert_allclose(lowered(x), plain(model)(x), rtol=1e-5, atol=1e-5)
    assert lowered.kernels["MatMulInteger"] == 1


def test_a_computed_bias_is_not_dropped():
    build, x = Build(["n", 2, 5, 5]), images(1, 2, 5, 5)
    bias = build.node("ReduceMax", "images", keepdims=0, shape=[])
    bias = build.node("Expand", bias, build.constant([2], np.int64), shape=[2])
    out = build.node("Conv", build.quantize("images", 0.3, 7), build.weight(images(2, 2, 1, 1), some_scales(2)), bias)
    model = build.model(out)
    lowered = Lowered(model)
    assert lowered.reasons == ["its bias is computed"]
    np.testing.assert_allclose(lowered(x), plain(model)(x), atol=1e-5)
