"""Layers as matrix products."""

import pytest
import torch
import torch.nn.functional as F

from planish.ptq.layers import LayerCall, patches

CONVOLUTIONS = {
    "1d": (F.conv1d, (2, 6, 11), (4, 6, 3), {"stride": 2, "padding": 1}),
    "2d": (F.conv2d, (2, 6, 9, 8), (4, 6, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": (F.conv2d, (2, 6, 9, 8), (4, 6, 3, 2), {"dilation": (2, 3), "padding": 2}),
    "same": (F.conv2d, (2, 6, 9, 8), (4, 6, 4, 3), {"padding": "same", "dilation": (2, 1)}),
    "valid": (F.conv2d, (2, 6, 9, 8), (4, 6, 4, 3), {"padding": "valid"}),
    "groups": (F.conv2d, (2, 6, 7, 7), (4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (F.conv2d, (2, 6, 7, 7), (12, 1, 3, 3), {"groups": 6, "stride": 2}),
    "3d": (F.conv3d, (2, 4, 5, 6, 7), (4, 2, 2, 3, 1), {"groups": 2, "padding": (1, 0, 1)}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_the_flattened_weight_is_the_convolution(name):
    torch.manual_seed(0)
    function, shape, kernel, options = CONVOLUTIONS[name]
    x, weight = torch.randn(shape), torch.randn(kernel)
    expected = function(x, weight, **options)
    groups = options.get("groups", 1)
    product = weight.reshape(groups, kernel[0] // groups, -1) @ patches(x, kernel[2:], **options)
    product = product.reshape(kernel[0], shape[0], *expected.shape[2:]).transpose(0, 1)
    torch.testing.assert_close(product, expected, atol=1e-4, rtol=1e-4)


def test_a_linear_call_for_features_of_any_rank():
    x, w = torch.randn(2, 3, 5, 4), torch.randn(6, 4)
    call = LayerCall("w", F.linear, {"input": x, "weight": w, "bias": None})
    (columns, none), *rest = call.columns()
    assert none is None
    assert not rest
    assert torch.equal(columns[0].T.reshape(x.shape), x)
    scale = torch.rand(6, 1)
    assert torch.equal(call.matrix(scale), scale.expand(6, 4)[None])
