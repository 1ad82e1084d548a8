"""First-order contributions of layers against gradients taken one image at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.flatness.contributions import by_image, layer_contributions
from planish.flatness.subject import Subject
from tests.flatness.networks import attention_net, conv_net, images


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_they_are_each_images_gradient_times_its_error(make):
    model = make()
    subject = Subject.prepare(model, images(model, 11, 4), ["w3a3"])
    grids = subject.grids("w3a3")
    found = layer_contributions(subject, grids, subject.batches)
    clean = subject.losses()
    assert found.shape == (len(subject.products), 11)
    x, y = torch.cat([x for x, _ in subject.batches]), torch.cat([y for _, y in subject.batches])
    for row, product in zip(found, subject.products, strict=True):
        for i in range(11):
            assert row[i] == pytest.approx(_by_hand(subject, product, x[i : i + 1], y[i : i + 1]), rel=1e-3, abs=1e-6)
    assert torch.equal(subject.losses(), clean)


def _by_hand(subject: Subject, product, x, y) -> float:
    """One image, one product: the sum over its activations of grad . (Q(x) - x), with the gradient at a leaf."""
    kept = {}

    class Keep(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, tensor):
            kept[self.name] = (tensor.detach(), torch.zeros_like(tensor, requires_grad=True))
            return tensor + kept[self.name][1]

    names = [site.name for site in product.sites if not site.is_weight]
    with subject.tapped({name: Keep(name) for name in names}):
        F.cross_entropy(subject.model(x), y).backward()
    quantizers = subject.quantizers["w3a3"]
    return sum(float((shift.grad * (quantizers[name](t) - t)).sum()) for name, (t, shift) in kept.items())


def test_without_rounded_activations_there_is_nothing():
    model = conv_net()
    subject = Subject.prepare(model, images(model, 6), ["w3"])
    assert layer_contributions(subject, subject.grids("w3"), subject.batches).shape == (0, 6)


def test_images_are_told_apart_wherever_their_axis_is():
    x = torch.arange(24).reshape(3, 8)
    assert by_image(x, (1, 8), 3).tolist() == x.tolist()
    assert by_image(x.reshape(6, 4), (2, 4), 3).tolist() == x.tolist()  # windows of an image come one after the other
    assert by_image(x.T, (8, 1), 3).tolist() == x.tolist()  # sequence first
    assert by_image(x, (1, 8), 1).shape == (1, 24)
    assert by_image(x, (3, 8), 3) is None  # the same for every image
    assert by_image(x, (1, 4), 3) is None
