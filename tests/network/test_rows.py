"""Rows in units of their largest value: nothing changes in float, and the taps see rows from 0 to 1."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.network import attach, detach, watch
from planish.network.attention import mix_values, multi_head_attention_forward
from planish.network.batches import call_model, logits_of
from planish.network.rebuilding import rebuild, rebuilt
from planish.network.rows import divide_rows, divides_rows
from tests.network.zoo import build


def multiply(operator, names, left, right):
    return left @ right


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


class Seen(nn.Module):
    """Keeps what passes."""

    idle = False

    def forward(self, x):
        self.x = x
        return x


def test_the_result_and_its_gradients_stay():
    p, v = draw(2, 3, 5, 7).softmax(-1).requires_grad_(), draw(2, 3, 7, 4).requires_grad_()
    results = [mix_values(p, v, multiply, by_row) for by_row in (False, True)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result.square().sum(), (p, v)) for result in results]
    torch.testing.assert_close(*gradients)


def test_the_largest_value_is_a_constant_in_the_backward_pass():
    """Rounded by a straight-through estimator, the rows get the gradient of the product as if nothing was rounded."""

    def rounded(operator, names, left, right):
        return (left + (left.mul(3).round() / 3 - left).detach()) @ right

    p, v = draw(2, 3, 5, 7).softmax(-1).requires_grad_(), draw(2, 3, 7, 4)
    mixed = mix_values(p, v, rounded, True)
    (gradient,) = torch.autograd.grad(mixed.square().sum() / 2, p)
    torch.testing.assert_close(gradient, mixed.detach() @ v.transpose(-2, -1))


def test_under_autocast_the_type_stays_that_of_the_product():
    p, v = draw(2, 5, 7).softmax(-1), draw(2, 7, 4).bfloat16()
    product = lambda operator, names, left, right: left.to(right) @ right  # noqa: E731
    assert mix_values(p, v, product, True).dtype == mix_values(p, v, product, False).dtype == torch.bfloat16


def test_the_product_sees_rows_up_to_one():
    seen = {}

    def product(operator, names, left, right):
        seen["rows"] = left
        return left @ right

    p = draw(2, 3, 5, 7).softmax(-1)
    p[0, 1, 2] = 0  # a query that may see nothing
    mixed = mix_values(p, draw(2, 3, 7, 4), product, True)
    peaks = seen["rows"].amax(-1).flatten()
    assert torch.equal(peaks.sort().values, torch.ones(30).index_fill(0, torch.tensor(0), 0.0))
    assert torch.equal(mixed[0, 1, 2], torch.zeros(4))


@pytest.mark.parametrize("name", ["vit_gray_28", "deit", "hf_vit_sdpa", "torchvision_vit", "encoder"])
def test_attention_of_many_networks(name):
    model, example = build(name)
    products = watch(model, example).products
    paths = [product.module for product in products if product.operator == "attention_av"]
    assert paths
    expected = output(model, example)
    assert divide_rows(model, paths) == paths
    assert all(divides_rows(model.get_submodule(path)) for path in paths)
    seen = {}

    def make(site):
        if site.slot.endswith("_probabilities"):
            return seen.setdefault(site.name, Seen())
        return None

    attach(model, watch(model, example).products, make)
    torch.testing.assert_close(output(model, example), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == len(paths)
    for tap in seen.values():
        torch.testing.assert_close(tap.x.amax(-1), torch.ones_like(tap.x.amax(-1)))
    detach(model)
    torch.testing.assert_close(output(model, example), expected)


@torch.no_grad()
def output(model, example):
    return logits_of(call_model(model, example))


def test_it_is_noted_and_can_be_done_again():
    model, _ = build("vit_gray_28")
    other = copy.deepcopy(model)
    divide_rows(model, ["blocks.0.attn"])
    rebuild(other, rebuilt(model))
    assert rebuilt(other) == rebuilt(model)
    assert [divides_rows(copy.deepcopy(other).blocks[i].attn) for i in (0, 1)] == [True, False]


def test_multi_head_attention():
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2), draw(5, 3, 8)
    options = (8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight,
               layer.out_proj.bias)  # fmt: skip
    expected, weights = F.multi_head_attention_forward(x, x, x, *options)
    rows = []

    def product(operator, names, left, right):
        if operator == "attention_av":
            rows.append(left)
        return left @ right

    ours, shown = multi_head_attention_forward(x, x, x, *options, product=product, by_row=True)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(shown, weights)
    assert torch.equal(rows[0].amax(-1), torch.ones(rows[0].shape[:-1]))
