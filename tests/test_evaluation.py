import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from planish.data import make_loader
from planish.errors import PlanishError
from planish.evaluation import evaluate, predict

torch.set_num_threads(1)


class Table(nn.Module):
    """The input is the logits."""

    def forward(self, x):
        return x


def table(n=53, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = (
        2 * torch.randn(n, classes, generator=generator),
        torch.randint(0, classes, (n,), generator=generator),
    )
    known = torch.rand(n, generator=generator) < 0.6  # some bins too sure of themselves, some not sure enough
    return logits, torch.where(known, logits.argmax(1), labels)


def reference_metrics(logits, labels, bins=15):
    x, y = logits.double().numpy(), labels.numpy()
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    right = p.argmax(1) == y
    confidence = p.max(1)
    ece = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return right.mean(), -np.log(p[np.arange(len(y)), y]).mean(), ece


@pytest.mark.parametrize("batch", [1, 7, 53, 100])
def test_against_numpy(batch):
    logits, labels = table()
    result = evaluate(Table(), DataLoader(TensorDataset(logits, labels), batch))
    top1, nll, ece = reference_metrics(logits, labels)
    assert result["top1"] == pytest.approx(top1, abs=1e-6)
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["ece"] == pytest.approx(ece, abs=1e-5)
    assert result["images"] == 53
    assert result["seconds"] >= 0
    assert "flip_rate" not in result


def test_flips_are_counted_against_a_model_and_against_logits():
    logits, labels = table()
    other = logits.clone()
    other[:9] = -other[:9]
    batches = DataLoader(TensorDataset(logits, labels), 10)

    class Changed(nn.Module):
        def forward(self, x):
            return torch.where((x[:, None] == logits[None, :9]).all(-1).any(-1, keepdim=True), -x, x)

    expected = (logits.argmax(1) != other.argmax(1)).float().mean().item()
    assert expected > 0.1
    assert evaluate(Table(), batches, reference=Changed())["flip_rate"] == pytest.approx(expected)
    assert evaluate(Table(), batches, reference=other)["flip_rate"] == pytest.approx(expected)
    assert evaluate(Table(), batches, reference=Table())["flip_rate"] == 0.0
    with pytest.raises(PlanishError, match="52 images"):
        evaluate(Table(), batches, reference=other[1:])


def test_flips_and_shuffled_loaders():
    logits, labels = table()
    ours = make_loader(TensorDataset(logits, labels), 8, shuffle=True, seed=0)
    assert evaluate(Table(), ours, reference=Table())["flip_rate"] == 0.0  # its order is a function of the epoch
    stock = DataLoader(TensorDataset(logits, labels), 8, shuffle=True)
    with pytest.raises(PlanishError, match="another order"):
        evaluate(Table(), stock, reference=Table())


@pytest.mark.parametrize("bad", [5, -1])
def test_label_out_of_range(bad):
    logits, labels = table()
    labels[3] = bad
    with pytest.raises(PlanishError, match=rf"a label is {bad}, but the model has 5 classes"):
        evaluate(Table(), DataLoader(TensorDataset(logits, labels), 10))


def test_empty_and_unlabelled():
    with pytest.raises(PlanishError, match="no batch"):
        evaluate(Table(), [])
    with pytest.raises(PlanishError, match="needs labels"):
        evaluate(Table(), [torch.zeros(2, 3)])


def test_dictionaries_and_outputs_with_logits():
    logits, labels = table(12)

    class Hub(nn.Module):
        def forward(self, pixel_values):
            return SimpleNamespace(loss=None, logits=pixel_values)

    batches = [{"pixel_values": logits[i : i + 5], "labels": labels[i : i + 5]} for i in (0, 5, 10)]
    result = evaluate(Hub(), batches)
    assert result["top1"] == pytest.approx(reference_metrics(logits, labels)[0])
    assert result["images"] == 12


def test_half_precision_logits():
    logits, labels = table()
    result = evaluate(Table(), [(logits.bfloat16(), labels)])
    assert result["nll"] == pytest.approx(reference_metrics(logits.bfloat16().float(), labels)[1], rel=1e-5)


def test_modes_are_restored_and_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
    model[1].eval()
    logits, labels = table()
    first = predict(model, [(logits, labels)])[0]
    assert torch.equal(first, predict(model, [(logits, labels)])[0])
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert torch.equal(model[1].running_mean, torch.zeros(5))
    assert not first.requires_grad
    with pytest.raises(ValueError, match="a label is"):
        evaluate(model, [(logits, labels + 100)])
    assert model.training


def test_progress_and_order():
    logits, labels = table(10)
    calls = []
    out, found, _ = predict(
        Table(), DataLoader(TensorDataset(logits, labels), 4), progress=lambda *done: calls.append(done)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(out, logits)
    assert torch.equal(found, labels)
    assert not math.isnan(out.sum())
