"""Batches in and logits out, in the shapes that loaders and models use."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network.batches import (
    call_model,
    copied,
    first_image,
    first_images,
    join,
    logits_of,
    split_batch,
    to_device,
)


class Add(nn.Module):
    def forward(self, a, b=1):
        return a + b


def test_inputs_are_spread():
    one = torch.ones(1)
    assert call_model(Add(), one) == 2
    assert call_model(Add(), (one, 5)) == 6
    assert call_model(Add(), {"a": one, "b": 3}) == 4


def test_split_batch():
    images, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    for batch in ((images, labels), [images, labels]):
        assert split_batch(batch)[0] is images
        assert split_batch(batch)[1] is labels
    assert split_batch(images) == (images, None)
    assert split_batch((images,)) == (images, None)
    for key in ("labels", "label", "target", "targets"):
        inputs, found = split_batch({"pixel_values": images, key: labels})
        assert list(inputs) == ["pixel_values"]
        assert found is labels
    assert split_batch({"pixel_values": images})[1] is None
    with pytest.raises(PlanishError, match="has 3 parts"):
        split_batch((images, labels, labels))


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)]
)
def test_logits(wrap):
    logits = torch.randn(2, 3)
    assert logits_of(wrap(logits)) is logits


@pytest.mark.parametrize("output", [None, {"features": torch.zeros(1)}, (), SimpleNamespace(logits=None)])
def test_no_logits(output):
    with pytest.raises(PlanishError, match=f"returns a {type(output).__name__} without logits"):
        logits_of(output)


def test_first_image_and_device_go_through_containers():
    batch = {"a": torch.zeros(4, 2), "b": [torch.ones(4)], "c": "text"}
    first = first_image(batch)
    assert first["a"].shape == (1, 2)
    assert first["b"][0].shape == (1,)
    assert first["c"] == "text"
    assert to_device(batch, "meta")["b"][0].is_meta


def test_batches_are_joined_whatever_they_are():
    a, b = torch.randn(3, 4), torch.randn(2, 4)
    assert torch.equal(join([a, b]), torch.cat([a, b]))
    joined = join([{"x": a, "also": (a,)}, {"x": b, "also": (b,)}])
    assert torch.equal(joined["x"], torch.cat([a, b]))
    assert torch.equal(joined["also"][0], torch.cat([a, b]))


def test_the_first_images_come_from_as_many_batches_as_hold_them():
    batches = [{"x": part, "y": part + 10} for part in torch.arange(7).split(3)]
    for count, expected in ((2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4, 5, 6])):
        first = first_images(batches, count)
        assert first["x"].tolist() == expected
        assert (first["y"] - first["x"]).tolist() == [10] * len(expected)


def test_a_copy_has_tensors_of_its_own_and_one_stays_one():
    x, y = torch.ones(2), torch.ones(2)
    again = copied(((x, x, y), {"mask": None, "key": x}))
    (a, b, c), options = again
    assert a is b is options["key"]
    assert a is not c
    assert options["mask"] is None
    a.zero_()
    assert x.sum() == 2
