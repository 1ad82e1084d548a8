"""Flips, classes and calibration counted by hand, and two networks on corrupted images."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

import planish
from planish.errors import PlanishError
from planish.flatness.corruptions import corrupted
from planish.flatness.damage import CorruptionDamage, calibration_error, corruption_damage, damage, switched
from planish.flatness.subject import Subject
from planish.preprocessing import Preprocessing
from planish.ptq import quantize
from tests.flatness.networks import conv_net, images

GREY = Preprocessing((1, 8, 8), (0.5,), (0.25,))


def answers(*classes: int, size: int = 4) -> torch.Tensor:
    """Logits of a network that is rather sure of these classes."""
    return 2.0 * torch.nn.functional.one_hot(torch.tensor(classes), size).float()


def test_flips_and_classes_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    before, after = answers(0, 0, 1, 1, 2, 3), answers(0, 1, 2, 1, 1, 0)
    found = damage(before, after, labels, ["shirt", "bag", "hat", "shoe"])
    assert found.images == 6
    assert found.flips == pytest.approx(5 / 6 - 1 / 6)
    assert (found.right_to_wrong, found.wrong_to_right) == (2, 1)
    rows = [(c.name, c.images, c.float, c.low_bit) for c in found.classes]
    assert rows == [("shirt", 3, 2 / 3, 1 / 3), ("bag", 2, 0.5, 1.0), ("shoe", 1, 1.0, 0.0)]
    assert json.loads(json.dumps(asdict(found)))["classes"][1]["name"] == "bag"


def test_without_a_change_there_is_no_damage():
    labels = torch.tensor([0, 1, 2, 2])
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = damage(logits, logits, labels)
    assert found.flips == found.right_to_wrong == found.wrong_to_right == 0
    assert found.ece_float == found.ece_low_bit
    assert [c.name for c in found.classes] == ["0", "1", "2"]
    assert all(c.float == c.low_bit for c in found.classes)


def test_calibration_error_is_that_of_guo():
    """The twin: 15 bins of confidence, the gap between accuracy and confidence in each, weighted by its images."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 6, generator=generator)
    labels = torch.randint(6, (500,), generator=generator)
    confidence, predicted = (x.numpy() for x in logits.double().softmax(-1).max(-1))
    right = predicted == labels.numpy()
    bins = np.ceil(confidence * 15).astype(int)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert calibration_error(logits, labels) == pytest.approx(sum(gaps), abs=1e-5)
    found = damage(logits, 0.1 * logits, labels)
    assert found.ece_float == pytest.approx(sum(gaps), abs=1e-5)
    assert found.ece_low_bit == pytest.approx(calibration_error(0.1 * logits, labels))
    assert found.flips == 0


def test_figures_are_those_of_evaluate():
    model = conv_net()
    batches = images(model, 60)
    low = quantize(model, [x for x, _ in batches], "w2a2")
    subject = Subject.prepare(model, batches, ["w2a2"])
    with subject.tapped(subject.grids("w2a2")):
        logits = subject.logits()
    labels = torch.cat([y for _, y in batches])
    found = damage(subject.logits(), logits, labels)
    expected = planish.evaluate(low, batches, reference=model)
    assert found.flips == pytest.approx(expected["flip_rate"])
    assert found.ece_low_bit == pytest.approx(expected["ece"], abs=1e-6)
    assert sum(c.low_bit * c.images for c in found.classes) / 60 == pytest.approx(expected["top1"])


def test_one_image_and_one_class():
    found = damage(answers(2), answers(1), torch.tensor([2]))
    assert found.flips == found.right_to_wrong == 1
    assert [(c.name, c.float, c.low_bit) for c in found.classes] == [("2", 1.0, 0.0)]
    confidence = answers(2).softmax(-1).max().item()
    assert found.ece_float == pytest.approx(1 - confidence)
    assert found.ece_low_bit == pytest.approx(confidence)


def test_corrupted_top1_is_that_of_a_plain_loop():
    model = conv_net()
    batches = images(model, 40)
    subject = Subject.prepare(model, batches, ["w2a2"])
    low = quantize(model, [x for x, _ in batches], "w2a2")
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    trials = [(kind, strength) for kind in ("noise", "jpeg") for strength in (0, 1, 5)]
    rows = []
    with torch.no_grad():
        for trial in trials:
            changed = corrupted(x, GREY, *trial, seed=3)
            rows.append([(net(changed).argmax(-1) == y).double().mean().item() for net in (model, low)])
    expected = [CorruptionDamage(*trial, *row) for trial, row in zip(trials, rows, strict=True)]
    for pair in ((model, low), (switched(subject), switched(subject, "w2a2"))):
        found = corruption_damage(*pair, batches, GREY, ("noise", "jpeg"), (0, 1, 5), seed=3)
        assert found == expected
    assert len({row[0] for row in rows}) > 1
    one_batch = corruption_damage(model, low, [(x, y)], GREY, ("noise", "jpeg"), (0, 1, 5), seed=3)
    assert one_batch == expected


def test_by_default_four_kinds_at_five_strengths():
    model = conv_net()
    batches = iter(images(model, 20, 8))
    seen = []
    found = corruption_damage(model, model, batches, GREY, progress=lambda done, total: seen.append((done, total)))
    assert [(row.kind, row.strength) for row in found[::5]] == [(k, 1) for k in ("noise", "blur", "contrast", "jpeg")]
    assert len(found) == 20
    assert all(row.float == row.low_bit for row in found)
    assert seen == [(1, 0), (2, 0), (3, 0)]


def test_modes_and_switches_are_left_as_they_were():
    model = conv_net().train()
    batches = images(model, 20)
    subject = Subject.prepare(model, batches, ["w2a2"])
    clean = subject.logits()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    corruption_damage(model, switched(subject, "w2a2"), batches, GREY, ("blur",), (1,))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(subject.logits(), clean)


class _Keyed(nn.Module):
    """Takes keywords and gives an object, as Hugging Face does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        assert mask.all()
        return {"logits": self.net(pixel_values)}


def test_models_of_keywords_are_understood():
    model = _Keyed()
    batches = images(model.net, 20)
    keyed = [{"pixel_values": x, "mask": torch.ones(len(x), 3), "labels": y} for x, y in batches]
    found = corruption_damage(model, model, keyed, GREY, ("noise",), (5,))
    assert found == corruption_damage(model.net, model.net, batches, GREY, ("noise",), (5,))


def test_errors():
    model, batches = conv_net(), images(conv_net(), 4)
    good, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    few = (good[:1], good, labels), (good, good, labels[:1]), (good[:0], good[:0], labels[:0])
    for args in (*few, (good[:, :1], good[:, :1], labels)):
        with pytest.raises(PlanishError, match="one label an image"):
            damage(*args)
    with pytest.raises(PlanishError, match="labels go from 0 to 3"):
        damage(good, good, torch.tensor([0, 3]))
    with pytest.raises(PlanishError, match="2 names do not fit 3"):
        damage(good, good, labels, ["a", "b"])
    with pytest.raises(PlanishError, match="no batch"):
        corruption_damage(model, model, [], GREY)
    with pytest.raises(PlanishError, match="needs labels"):
        corruption_damage(model, model, [x for x, _ in batches], GREY)
    with pytest.raises(PlanishError, match="not known"):
        corruption_damage(model, model, batches, GREY, ("fog",))
    with pytest.raises(PlanishError, match="1 to 5"):
        corruption_damage(model, model, batches, GREY, strengths=(9,))
