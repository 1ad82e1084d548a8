import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.training import Averaging, Ingredient
from tests.training import tiny


class Set(Ingredient):
    """After step t the one weight is values[t]."""

    def __init__(self, values):
        self.values = values

    @torch.no_grad()
    def after_step(self, run):
        run.model.weight.fill_(self.values[run.step])


def averaged(values, *args, fail=None):
    model = nn.Linear(1, 4, bias=False)
    nn.init.constant_(model.weight, 5.0)
    batches = [(torch.ones(1, 1), torch.tensor([0]))] * len(values)

    class Fail(Ingredient):
        def after_step(self, run):
            if run.step == fail:
                raise RuntimeError("fail")

    try:
        tiny.fit(model, [Set(values), Averaging(*args), Fail()], batches, run_settings=tiny.settings(epochs=1))
    except RuntimeError:
        assert fail is not None
    return model.weight[0].item()


def test_constant_weights_average_to_themselves():
    # d_n = min(0.5, (1 + n) / (10 + n)): what is left of the first weight is the product
    left = 1.0
    for n in range(1, 31):
        left *= min(0.5, (1 + n) / (10 + n))
    assert averaged([2.0] * 30, 0.5) == pytest.approx(5 * left + 2 * (1 - left), abs=1e-6)


def test_moving_average_of_a_geometric_series():
    expected = 5.0
    values = [0.9**t for t in range(40)]
    for n, value in enumerate(values, 1):
        d = min(0.8, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    assert averaged(values, 0.8) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_equal_average(start):
    values = [float(t) for t in range(10)]
    tail = values[int(start * 10) :]
    assert averaged(values, None, start) == pytest.approx(sum(tail) / len(tail), rel=1e-6)


def test_failure_leaves_the_weights():
    assert averaged([1.0, 2.0, 3.0, 4.0], 0.5, fail=2) == 3.0


def test_buffers_and_frozen_weights_are_left():
    model = tiny.conv()
    model[0].requires_grad_(False)
    tiny.fit(model, [Averaging(0.9)])
    plain = tiny.conv()
    plain[0].requires_grad_(False)
    tiny.fit(plain)
    assert torch.equal(model[0].weight, tiny.conv()[0].weight)
    assert torch.equal(model[1].running_mean, plain[1].running_mean)
    assert not torch.equal(model[4].weight, plain[4].weight)


@pytest.mark.parametrize("arguments", [(1.0,), (0.0,), (0.9, 1.0), (0.9, -0.1)])
def test_options_are_checked(arguments):
    with pytest.raises(PlanishError):
        Averaging(*arguments)
