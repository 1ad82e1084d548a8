"""Correlations of errors against numpy, and against errors of which one knows whether they are independent."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.flatness.correlations import correlate, layer_correlation, random_signs
from planish.flatness.subject import Subject
from tests.flatness.networks import attention_net, conv_net, images
from tests.network.zoo import build


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def off_diagonal(matrix: np.ndarray) -> float:
    return float(np.abs(matrix[~np.eye(len(matrix), dtype=bool)]).mean())


@torch.no_grad()
def test_of_a_convolution_and_of_a_linear_layer_they_are_those_of_numpy():
    model = conv_net()
    subject = Subject.prepare(model, images(model), ["w3a3"])
    grids = subject.grids("w3a3")
    found = {p.product: p for p in correlate(subject, grids, subject.batches).products}
    x, net = torch.cat([x for x, _ in subject.batches]), subject.model
    inputs = {"0.conv2d": x, "3.conv2d": net[2](net[1](net[0](x)))}
    inputs["7.linear"] = net[6](net[5](net[4](net[3](inputs["3.conv2d"]))))
    assert found.keys() == inputs.keys()
    for product, h in inputs.items():
        layer = net[int(product[0])]
        compute = F.linear if product == "7.linear" else partial_conv(layer)
        rounded_w, rounded_h = (
            grids[f"{product[0]}.{slot}"](t) for slot, t in (("weight", layer.weight), ("input", h))
        )
        of_weight, of_input = compute(h, rounded_w - layer.weight), compute(rounded_h - h, layer.weight)
        found_here = found[product].weight_activation
        assert found_here.value == pytest.approx(cosine(of_weight, of_input), abs=1e-4)
        channels = (rounded_h - h).movedim(1, -1).flatten(0, -2).numpy().T
        if len(channels) == 1:
            assert math.isnan(found[product].channels.value)
            continue
        assert found[product].channels.value == pytest.approx(off_diagonal(np.corrcoef(channels)), rel=1e-4)
        assert found[product].channels.chance == pytest.approx(math.sqrt(2 / math.pi / channels.shape[1]))
    everything = correlate(subject, grids, subject.batches)
    mean = np.mean([abs(p.weight_activation.value) for p in found.values()])
    assert everything.weight_activation.value == pytest.approx(mean)


def partial_conv(layer: nn.Conv2d):
    return lambda h, weight: F.conv2d(h, weight, stride=layer.stride)


class _Add(nn.Module):
    """An error of our own making in place of a quantizer's."""

    def __init__(self, error) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        return x + self.error(x)


def linear_subject(outputs: int = 200) -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, outputs), nn.Linear(outputs, 5))
    return Subject.prepare(model, [(torch.randn(200, 64), torch.arange(200) % 5)], ["w4a4"])


def test_independent_errors_stay_at_the_chance_level_and_shrinkage_does_not():
    """Quantizers that pull weights and activations towards 0 leave errors -c W x in both parts: they add up."""
    subject = linear_subject()
    noise = torch.Generator().manual_seed(1)
    independent = {n: _Add(lambda x: 0.1 * torch.randn(x.shape, generator=noise)) for n in subject.quantizers["w4a4"]}
    found = correlate(subject, independent, subject.batches)
    first = found.products[0]
    assert abs(first.weight_activation.value) < 4 * first.weight_activation.chance < 0.02
    assert first.channels.value == pytest.approx(first.channels.chance, rel=0.1)
    shrinking = {
        n: _Add(lambda x: 0.2 * (x.std() * torch.randn(x.shape, generator=noise) - x))
        for n in subject.quantizers["w4a4"]
    }
    found = correlate(subject, shrinking, subject.batches)
    assert found.products[0].weight_activation.value > 10 * found.products[0].weight_activation.chance
    alike = {n: _Add(lambda x: 0.1 * torch.randn(len(x), 1, generator=noise)) for n in subject.quantizers["w4a4"]}
    found = correlate(subject, alike, subject.batches)
    assert found.products[0].channels.value == pytest.approx(1, abs=1e-4)


def test_chance_of_one_output_channel_is_the_value_itself():
    """With a single sign nothing can cancel."""
    subject = linear_subject(outputs=1)
    first = correlate(subject, subject.grids("w4a4"), subject.batches).products[0]
    assert first.weight_activation.chance == pytest.approx(abs(first.weight_activation.value))


def test_layers_are_correlated_as_numpy_says_and_chance_is_that_of_signs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 100, generator=generator, dtype=torch.float64) ** 3  # a few images matter most
    rows[1] += rows[0]
    found = layer_correlation(rows, generator)
    assert found.value == pytest.approx(off_diagonal(np.corrcoef(rows.numpy())))
    assert found.chance == pytest.approx(math.sqrt(2 / math.pi / 100), rel=0.15)
    same = layer_correlation(torch.randn(1, 100, generator=generator).double().repeat(4, 1), generator)
    assert same.value == pytest.approx(1)
    assert same.chance == pytest.approx(math.sqrt(3 * 2 / math.pi / 100), rel=0.15)  # 3: E x^4 / (E x^2)^2
    # one image has large gradients in all layers: then chance alone gives large correlations, too
    one = torch.randn(6, 100, generator=generator, dtype=torch.float64)
    one[:, 0] *= 1000
    assert layer_correlation(one, generator).chance > 0.9
    assert math.isnan(layer_correlation(rows[:1], generator).value)
    assert math.isnan(layer_correlation(rows[:, :1], generator).value)
    assert math.isnan(layer_correlation(torch.zeros(0, 5), generator).value)


def test_signs_are_signs():
    signs = random_signs(50, 40, generator=torch.Generator().manual_seed(0))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.1


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_nothing_is_rounded_meanwhile_and_seeds_repeat(make):
    model = make()
    subject = Subject.prepare(model, images(model), ["w4a4", "w4"])
    clean = subject.logits()
    found = correlate(subject, subject.grids("w4a4"), subject.batches)
    assert torch.equal(subject.logits(), clean)
    assert found == correlate(subject, subject.grids("w4a4"), subject.batches)
    again = correlate(subject, subject.grids("w4a4"), subject.batches, seed=1)
    assert again.layers.chance != found.layers.chance
    assert again.layers.value == found.layers.value
    assert [p.product for p in found.products] == [p.name for p in subject.products if p.weight]
    json.dumps(dataclasses.asdict(found))
    weights_only = correlate(subject, subject.grids("w4"), subject.batches)
    assert weights_only.products == []
    assert math.isnan(weights_only.weight_activation.value)
    assert math.isnan(weights_only.layers.chance)


@pytest.mark.parametrize("name", ["einsum", "twice", "encoder", "hf_vit_sdpa", "gpt2", "convolutions"])
def test_products_are_found_in_any_model(name):
    model, example = build(name)
    subject = Subject.prepare(model, [example], ["w4a4"])
    found = correlate(subject, subject.grids("w4a4"), subject.batches)
    paired = [p.product for p in found.products]
    assert paired == [p.name for p in subject.products if p.weight and any(s.role == "input" for s in p.sites)]
    assert not any(math.isnan(p.weight_activation.value) for p in found.products)
    assert found.layers.value > 0
