import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.flattening import FlattenSettings
from planish.flattening.recipe import make_ingredients
from planish.training import Distillation, Ingredient, OutputError, TaskLoss
from tests.training import tiny


class Spy(Ingredient):
    """What another ingredient's loss is at each step."""

    def __init__(self, other):
        self.other, self.values, self.expected = other, [], []

    def loss(self, run, inputs, labels, logits):
        self.values.append(self.other.loss(run, inputs, labels, logits).item())


def test_task_loss_with_smoothing():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    run = SimpleNamespace(model=nn.Identity())
    assert torch.equal(TaskLoss(2.0, 0.1).loss(run, None, labels, logits), 2 * expected)
    with pytest.raises(PlanishError, match="labels"):
        TaskLoss().loss(None, None, None, logits)


def test_distillation_is_the_divergence_and_reads_no_labels():
    teacher, student = tiny.conv(1), tiny.conv(2)
    given = [p.detach().clone() for p in teacher.parameters()]
    images = torch.randn(8, 1, 8, 8)
    temperature = 3.0
    seen = []

    class Check(Ingredient):
        def loss(self, run, inputs, labels, logits):
            mine = term.loss(run, inputs, labels, logits)
            p, q = (teacher.eval()(inputs) / temperature).softmax(-1), (logits / temperature).softmax(-1)
            literal = 0.5 * temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
            torchs = 0.5 * temperature**2 * nn.KLDivLoss(reduction="batchmean")(q.log(), p)
            seen.append((mine.item(), literal.item(), torchs.item()))

    term = Distillation(teacher, 0.5, temperature)
    tiny.fit(student, [term, Check()], [(images, torch.full((8,), -1))] * 3, task=False)
    assert len(seen) == 6
    for mine, literal, torchs in seen:
        assert mine == pytest.approx(literal, abs=1e-6)
        assert mine == pytest.approx(torchs, abs=1e-6)
    assert seen[-1][0] < seen[0][0]
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(teacher.parameters(), given, strict=True))
    assert not teacher.training


def test_output_error_is_the_squared_distance_to_the_given_network():
    student = tiny.mlp(1)
    term = OutputError(copy.deepcopy(student), 2.0)
    seen = []

    class Check(Ingredient):
        def loss(self, run, inputs, labels, logits):
            expected = 2.0 * ((logits - term.teacher(inputs)) ** 2).mean()
            seen.append((term.loss(run, inputs, labels, logits).item(), expected.item()))

    tiny.fit(student, [term, Check()])
    assert seen[0][0] == 0.0  # nothing has moved yet
    assert all(mine == pytest.approx(theirs, rel=1e-5) for mine, theirs in seen)
    assert min(mine for mine, _ in seen[1:]) > 0


def test_output_error_of_the_recipe_is_measured_against_the_given_network():
    given = tiny.conv(1)
    settings = FlattenSettings(output_error=1.0, part=1.0, averaging=None)
    made = make_ingredients(settings, given, [tiny.plan(given)])
    term = next(i for i in made if isinstance(i, OutputError))
    assert term.teacher is not given
    assert tiny.same(term.teacher, given)
