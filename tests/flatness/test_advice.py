"""Advice rests on what was measured: lifting a product to 8 bits is what it is said to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from planish.flatness.advice import Spared, about_bits, about_others, about_parts, about_products, size, spare
from planish.flatness.subject import Subject
from planish.ptq import quantize
from planish.scheme import Scheme
from tests.flatness.networks import attention_net, conv_net, images


@pytest.mark.parametrize(("build", "product"), [(conv_net, "3.conv2d"), (attention_net, "attn.qkv.linear")])
def test_a_spared_product_is_the_network_with_that_product_at_eight_bits(build, product):
    model = build()
    batches = images(model, count=100, batch=50)
    subject = Subject.prepare(model, batches, ["w2a2", "w8a8"])
    spared = spare(subject, "w2a2", [product])[0]
    labels, inputs = torch.cat([y for _, y in batches]), [x for x, _ in batches]
    mixed = replace(Scheme.parse("w2a2"), overrides=((product, "w8a8"),))  # the same by another way
    logits = []
    for scheme in ("w2a2", mixed):
        rounded = quantize(model, inputs, scheme)
        with torch.no_grad():
            logits.append(torch.cat([rounded(x) for x in inputs]))
    low, high = logits
    right = [(found.argmax(-1) == labels).double() for found in logits]
    assert spared.gain == pytest.approx((right[1] - right[0]).mean().item())
    assert spared.gain_error == pytest.approx((right[1] - right[0]).std().item() / 10)
    saved = F.cross_entropy(low.double(), labels) - F.cross_entropy(high.double(), labels)
    assert spared.loss == pytest.approx(saved.item(), abs=1e-6)
    weights = model.get_submodule(product.rpartition(".")[0]).weight.numel()
    assert spared.bytes == weights * 6 / 8


def test_each_product_is_compared_with_lifting_none():
    subject = Subject.prepare(conv_net(), images(conv_net()), ["w2a2", "w8a8"])
    both = spare(subject, "w2a2", ["3.conv2d", "0.conv2d"])
    assert both == [spare(subject, "w2a2", [name])[0] for name in ("3.conv2d", "0.conv2d")]
    assert (both[1].gain, both[1].bytes) == (0, 0)  # the first layer has 8 bits as it is


def test_the_best_comes_first_and_scatter_is_called_by_its_name():
    clear, more, vague = (
        Spared("b", 0.08, 0.01, 0.1, 12_000),
        Spared("c", 0.2, 0.01, 0.1, 0),
        Spared("a", 0.01, 0.02, 0.3, 0),
    )
    first, second = about_products([vague, clear, more], 512)
    assert (
        first.text
        == "c: keep it at 8 bits for +20.0 points and no bytes of the file (top-1 on the 512 images looked at, ± 1.0)."
    )
    assert second.text == "b: keep it at 8 bits for +8.0 points and 12.0 kB (top-1 on the 512 images looked at, ± 1.0)."
    assert (second.product, second.gain, second.bytes) == ("b", 0.08, 12_000)
    (only,) = about_products([vague], 512)
    assert only.text.startswith("No single product is worth 8 bits")
    assert "a (+1.0)" in only.text
    assert about_products([], 512) == []


def test_the_half_that_loses_most_is_named():
    assert "the weights lose most (0.3 of 0.36 nats" in about_parts("w2a4", 0.3, 0.05, 0.01).text
    assert "the activations lose most" in about_parts("w4a2", 0.05, 0.3, 0.01).text
    assert "together" in about_parts("w2a2", 0.1, 0.1, 0.5).text
    assert "about the same" in about_parts("w4a4", 0.1, 0.11, 0.01).text
    assert "does not raise the loss" in about_parts("w8a8", -0.001, 0.0005, -0.0002).text


def test_how_low_rounding_goes():
    text = about_bits(0.9, [("w8a8", 0.9), ("w4a4", 0.893), ("w3a3", 0.8)]).text
    assert text.startswith("Rounding alone keeps w4a4 within 1 point of float; w3a3 loses 10.0 points")
    assert "nothing else is needed" in about_bits(0.9, [("w8a8", 0.9)]).text
    by_luck = about_bits(0.9, [("w8a8", 0.9), ("w4a4", 0.8), ("w3a3", 0.9)]).text
    assert by_luck.startswith("Rounding alone keeps w8a8 within 1 point of float; w4a4 loses 10.0 points")
    assert about_bits(0.9, [("w4a4", 0.5)]).text.startswith("No scheme stays within 1 point; w4a4 loses 40.0 points")


def test_other_networks_are_set_beside_the_first():
    found = about_others("w3a3", {"given": (0.92, 0.777), "flat": (0.916, 0.889)})
    assert [one.text for one in found] == [
        "flat keeps 88.9 % top-1 at w3a3 (91.6 % in float), where given keeps 77.7 % (92.0 %)."
    ]
    assert about_others("w3a3", {"given": (0.92, 0.777)}) == about_others("w3a3", {}) == []


def test_sizes():
    assert [size(c) for c in (840, 12_345, 3_140_000)] == ["840 bytes", "12.3 kB", "3.14 MB"]
