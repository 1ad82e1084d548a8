"""What widths cost, against what the finished network takes, on every kind of network."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from planish.network import assign, ledger, watch, weights_megabytes
from planish.network.batches import first_image
from planish.ptq import Calibrate, Round, quantize
from planish.ptq.widths import (
    Widths,
    all_costs,
    find_layers,
    format_at,
    options_of,
    overrides_for,
    scale_count,
    total_bit_operations,
)  # fmt: skip
from planish.scheme import Format, Scheme
from tests.network.zoo import NAMES, build

WIDTHS = (2, 3, 4, 6, 8)


def fast(name):
    """A scheme whose ranges are quickly set."""
    scheme = Scheme.parse(name)
    weights, activations = (replace(fmt, observer="minmax") for fmt in (scheme.weights, scheme.activations))
    return replace(scheme, weights=weights, activations=activations)


def watched(name, scheme="w4a4", **options):
    model, example = build(name)
    return model, example, assign(watch(model, first_image(example)), scheme, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_costs_are_those_of_the_network_that_is_made(name):
    model, example, plan = watched(name, fast("w4a4"))
    random.seed(name)
    layers = find_layers(plan, activations=True)
    options = [options_of(layer, WIDTHS, activations=True) for layer in layers]
    picked = [random.randrange(len(row)) for row in options]
    overrides = overrides_for(plan, layers, [row[i] for row, i in zip(options, picked, strict=True)])
    mixed = assign(watch(model, first_image(example)), replace(plan.scheme, overrides=overrides))
    made = quantize(model, [example], mixed.scheme, [Calibrate(), Round()])  # folding adds biases
    for kind, unit, expected in (
        ("bytes", 8e6, weights_megabytes(made)), ("bops", 1, total_bit_operations(mixed)),
    ):  # fmt: skip
        fixed, costs = all_costs(kind, model, plan, layers, options)
        spent = fixed + sum(row[i] for row, i in zip(costs, picked, strict=True))
        assert spent / unit == pytest.approx(expected, rel=1e-12)
    for layer, row, i in zip(layers, options, picked, strict=True):
        for site in (*layer.weights, *layer.activations):
            bits = row[i].weights if site.is_weight else row[i].activations
            assert mixed.formats[site.name].bits == bits
            assert mixed.formats[site.name] == format_at(plan.scheme, site, plan.formats[site.name], bits)


def test_bit_operations_of_a_uniform_network_follow_from_its_ledger():
    for scheme in ("w4a4", "w3"):
        model, example, plan = watched("vit_gray_28", scheme)
        shares = ledger(model, scheme, example=first_image(example))
        product = {"w4a4": 16, "w8a8": 64, "a4a4": 16, "w3": 96, "w8": 256, "float": 1024}
        expected = sum(share * product[name] for name, share in shares.shares.items()) * shares.macs
        assert total_bit_operations(plan) == pytest.approx(expected)


def test_products_that_share_a_tensor_are_one_layer():
    _, _, plan = watched("twice")
    layers = find_layers(plan, activations=False)
    assert [[p.module for p in layer.products] for layer in layers] == [["body", "tied"], ["head"]]
    assert [[s.name for s in layer.weights] for layer in layers] == [["body.weight"], ["head.weight"]]
    cost = all_costs(
        "bytes", build("twice")[0], plan, layers, [options_of(x, WIDTHS, activations=False) for x in layers]
    )
    assert cost[1][0] == [48 * 48 * bits for bits in WIDTHS]


def test_attention_is_a_layer_where_activations_are_chosen():
    _, _, plan = watched("vit_gray_28")
    without, having = (find_layers(plan, activations=on) for on in (False, True))
    assert all(layer.weights for layer in without)
    more = {layer.name for layer in having} - {layer.name for layer in without}
    assert more == {f"blocks.{i}.attn.attention_{which}" for i in (0, 1) for which in ("qk", "av")}
    assert [o.describe() for o in options_of(without[1], (4, 2), activations=False)] == ["w2", "w4"]
    assert [o.describe() for o in options_of(having[1], (4, 2), activations=True)] == ["w2a2", "w2a4", "w4a2", "w4a4"]
    attention = next(layer for layer in having if not layer.weights)
    assert options_of(attention, (4, 2), activations=True) == [Widths(None, 2), Widths(None, 4)]
    order = [product.name for product in plan.products]
    assert all(order.index(a.name) < order.index(b.name) for a, b in pairwise(having))


def test_what_is_said_already_and_what_stays_in_float_is_not_chosen():
    scheme = replace(Scheme.parse("w4a4"), overrides=(("blocks.0.mlp.fc1.linear", "w6a6"),))
    model, _, plan = watched("vit_gray_28", scheme, allow=("blocks.1.mlp.fc2",))
    names = [layer.name for layer in find_layers(plan, activations=True)]
    assert "blocks.0.mlp.fc2.linear" in names
    assert not {"blocks.0.mlp.fc1.linear", "blocks.1.mlp.fc2.linear"} & set(names)
    layers = find_layers(plan, activations=False)
    fixed, _ = all_costs("bytes", model, plan, layers, [[Widths(4, None)]] * len(layers))
    _, _, more = watched("vit_gray_28", "w4a4", allow=("blocks.1.mlp.fc2",))
    least = find_layers(more, activations=False)
    assert fixed - all_costs("bytes", model, more, least, [[Widths(4, None)]] * len(least))[0] == 6 * 32 * 128


def test_only_what_changes_is_said():
    _, _, plan = watched("vit_gray_28", "w3a4")
    layers = find_layers(plan, activations=False)
    same = [Widths(plan.formats[layer.weights[0].name].bits, None) for layer in layers]
    assert overrides_for(plan, layers, same) == ()
    other = [Widths(2, None), *same[1:-1], Widths(4, None)]
    assert overrides_for(plan, layers, other) == (("patch_embed.proj.conv2d", "w2a8"), ("head.linear", "w4a8"))
    _, _, plan = watched("vit_gray_28", "w3")
    assert overrides_for(plan, find_layers(plan, activations=False), other)[0] == ("patch_embed.proj.conv2d", "w2")


def test_scales():
    _, _, plan = watched("vit_gray_28")
    sites = {site.name: site for product in plan.products for site in product.sites}
    weight, tokens = sites["blocks.0.mlp.fc1.weight"], sites["blocks.0.mlp.fc1.input"]
    counts = [scale_count(weight, Format(4, granularity)) for granularity in ("tensor", "channel", "group")]
    assert counts == [1, 128, 128 * 32]
    assert scale_count(tokens, Format(4, "token", symmetric=False)) == 17
