"""What is wrong with a batch is found in every place where a loader's batches are read, and named with its number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import planish
from planish.errors import PlanishError
from planish.flatness.subject import Subject
from planish.network.batches import map_tensors
from planish.network.faults import fault_in, going_through, label_fault, range_fault, sound
from planish.qat.methods import get_method
from planish.qat.recipe import train_quantized
from planish.training import TrainingFailed


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


def batches(count=3, size=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 3) for _ in range(count)]


def spoilt(change):
    """Three batches, of which ``change`` spoils the second."""
    found = batches()
    found[1] = change(*found[1])
    return found


def with_value(value):
    def change(images, labels):
        images[2, 0, 3, 3] = value
        return images, labels

    return change


IMAGES = {
    "NaN": (with_value(float("nan")), r"holds NaN in 1 of 4 images \(the first is number 3\)"),
    "infinite": (with_value(float("-inf")), "holds infinite values in 1 of 4 images"),
    "channels": (lambda x, y: (x[:, :2], y), r"holds float32 of shape \(4, 2, 8, 8\), which the model cannot take"),
    "bytes": (lambda x, y: (x.byte(), y), "holds uint8 of shape .*, which the model cannot take"),
    "nothing": (lambda x, y: (x[:0], y[:0]), "holds no image"),
}
LABELS = {
    "too many": (lambda x, y: (x, torch.arange(5) % 3), r"has labels of shape \(5,\) for logits of shape \(4, 3\)"),
    "float": (lambda x, y: (x, y.float()), "has labels of type float32: expected class numbers"),
    "text": (lambda x, y: (x, ["a"] * 4), "has labels that are a list"),
}
RANGE = {
    "too large": (lambda x, y: (x, y + 5), r"has the label 7, but the model has 3 classes"),
    "negative": (lambda x, y: (x, y - 1), "has the label -1, but the model has 3 classes"),
}


def model():
    torch.manual_seed(0)
    return Tiny().eval()


def case(name, kinds):
    change, words = kinds[name]
    return spoilt(change), f"batch 2 .*{words}"


@pytest.mark.parametrize("name", {**IMAGES, **LABELS, **RANGE})
def test_training_names_the_batch_and_keeps_the_weights(name):
    given = model()
    loader, words = case(name, {**IMAGES, **LABELS, **RANGE})
    with pytest.raises(TrainingFailed, match=words.replace("batch 2", "batch 2 of epoch 1")) as caught:
        planish.flatten(given, loader, scheme="w4a4", epochs=1)
    assert "\n" not in str(caught.value)
    assert all(torch.isfinite(value).all() for value in caught.value.state_dict.values())


@pytest.mark.parametrize("name", IMAGES)
def test_quantizing_names_the_batch(name):
    loader, words = case(name, IMAGES)
    with pytest.raises(PlanishError, match=words.replace("batch 2", "batch 2 of the calibration loader")):
        planish.quantize(model(), loader, "w4a4")


@pytest.mark.parametrize("name", {**IMAGES, **LABELS})
def test_evaluating_names_the_batch(name):
    loader, words = case(name, {**IMAGES, **LABELS})
    with pytest.raises(PlanishError, match=words.replace("batch 2", "batch 2 of the evaluation loader")):
        planish.evaluate(model(), loader)


@pytest.mark.parametrize("name", RANGE)
def test_evaluating_refuses_labels_that_are_no_class(name):
    with pytest.raises(PlanishError, match=r"a label is (7|-1), but the model has 3 classes"):
        planish.evaluate(model(), spoilt(RANGE[name][0]))


@pytest.mark.parametrize("name", ["NaN", "infinite"])
def test_diagnosing_names_the_batch(name):
    loader, words = case(name, IMAGES)
    with pytest.raises(PlanishError, match=words.replace("batch 2", "batch 2 of the diagnosis loader")):
        Subject.prepare(model(), loader, ["w4a4"])


@pytest.mark.parametrize("name", ["NaN", "infinite"])
def test_training_the_quantized_network_names_the_batch(name):
    loader, words = case(name, IMAGES)
    with pytest.raises(PlanishError, match=words):
        train_quantized(model(), loader, "w4a4", get_method("lsq"), calibration=[x for x, _ in batches(1)])
    with pytest.raises(PlanishError, match=words.replace("batch 2", "batch 2 of the calibration loader")):
        train_quantized(model(), batches(), "w4a4", get_method("lsq"), calibration=[x for x, _ in loader])


def test_sound_batches_pass_as_they_are():
    found = batches()
    assert all(a is b for a, b in zip(sound(found, "x"), found, strict=True))
    large = torch.full((2, 3), 3e38)
    assert fault_in({"pixels": large, "mask": torch.ones(2, dtype=torch.bool)}) is None  # their sum is infinite
    assert fault_in(torch.full((2, 60_000), 3.0, dtype=torch.float16)) is None
    assert fault_in({"a": torch.ones(2, 2), "b": torch.tensor([[0.0], [float("inf")]])}) == (
        "holds infinite values in 1 of 2 images (the first is number 2)"
    )


def test_labels_with_the_shape_of_the_logits_are_taken():
    logits = torch.zeros(4, 3)
    assert label_fault(torch.zeros(4, 3), logits) is None
    assert label_fault(torch.zeros(4, 3, dtype=torch.long), logits) is None
    assert label_fault(torch.zeros(4, dtype=torch.int16), logits) is None
    assert label_fault(torch.zeros(4, 1, dtype=torch.long), logits) is not None
    assert range_fault(torch.tensor([0, 2]), 3) is None
    assert range_fault(torch.full((4, 3), 9.0), 3) is None


def test_what_is_not_about_the_batch_goes_on_as_it_is():
    for error in (
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried"),
        KeyboardInterrupt(),
        PlanishError("as it is"),
    ):
        with pytest.raises(type(error)) as caught, going_through(torch.ones(1)):
            raise error
        assert caught.value is error
    assert map_tensors([torch.ones(1)], lambda t: t + 1)[0] == 2
