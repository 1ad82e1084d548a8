"""Metrics of labels and features against scikit-learn's definitions, written out."""

import pytest
import torch

from planish.errors import PlanishError
from planish.metrics import knn_top1, worth_of_features, worth_of_labels


def average_precision(scores, truth):
    """The mean of the precision at every hit, from the best score down."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    hits, total = 0, 0.0
    for place, i in enumerate(order, 1):
        if truth[i]:
            hits += 1
            total += hits / place
    return total / hits


def f1(said, truth):
    both = sum(a and b for a, b in zip(said, truth, strict=True))
    return 2 * both / max(1, sum(said) + sum(truth))


@pytest.mark.parametrize("labels", [1, 2, 7])
def test_labels_against_the_definitions(labels):
    generator = torch.Generator().manual_seed(labels)
    logits = torch.randn(40, labels, generator=generator)
    truth = (torch.randn(40, labels, generator=generator) + logits > 0).long()
    found = worth_of_labels(logits, truth)
    columns = [(logits[:, i].tolist(), truth[:, i].tolist()) for i in range(labels)]
    said = (logits > 0).long()
    assert found["map"] == pytest.approx(sum(average_precision(*c) for c in columns) / labels, abs=1e-5)
    assert found["ap_micro"] == pytest.approx(
        average_precision(logits.flatten().tolist(), truth.flatten().tolist()), abs=1e-5
    )
    assert found["f1"] == pytest.approx(
        sum(f1(said[:, i].tolist(), truth[:, i].tolist()) for i in range(labels)) / labels, abs=1e-6
    )
    assert found["f1_micro"] == pytest.approx(f1(said.flatten().tolist(), truth.flatten().tolist()), abs=1e-6)
    assert found["exact"] == pytest.approx((said == truth).all(1).float().mean().item())


def test_a_label_that_never_occurs_does_not_count():
    logits = torch.tensor([[2.0, 1.0, -1.0], [-2.0, 0.5, -3.0], [1.0, -1.0, 2.0]])
    truth = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    found = worth_of_labels(logits, truth)
    assert found["map"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2, abs=1e-6)


def test_neighbours_vote():
    centres = torch.eye(3)
    labels = torch.arange(30) % 3
    features = centres[labels] + 0.05 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    assert knn_top1(features, labels, features, labels, itself=True) == 1
    assert knn_top1(features, labels, features[:6], labels[:6].flip(0)) < 0.5
    alone = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert knn_top1(alone, torch.tensor([0, 1]), alone, torch.tensor([0, 1]), itself=True) == 0
    with pytest.raises(PlanishError, match="one class an image"):
        knn_top1(alone, torch.ones(2, 2), alone, torch.tensor([0, 1]))


def test_features_of_any_shape():
    features = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    found = worth_of_features(features, None, features, None)
    assert found["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["error"] == 0
    assert "knn_top1" not in found
