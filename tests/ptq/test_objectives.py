"""What outputs are compared by, against the equations and against gradients of the whole network."""

import math

import pytest
import torch
import torch.nn.functional as F

from planish.errors import PlanishError
from planish.ptq.flow import Flow, Suffix
from planish.ptq.objectives import (
    OBJECTIVES,
    First,
    check_objective,
    least_squares_diagonal,
    make_objective,
    output_gradients,
    squared_error,
)
from planish.ptq.shelf import Shelf
from planish.task import CLASSES
from tests.ptq.test_flow import MODELS, seen

torch.set_num_threads(1)


@pytest.fixture
def place():
    """A flow at its second unit, the unit's data, and what follows it."""
    torch.manual_seed(0)
    student, teacher, units, batches = MODELS["resnet"]()
    flow = Flow(student, teacher, units, batches, Shelf(1e9))
    flow.advance(0, flow.data(0))
    features, _ = seen(teacher, units[-1].path, batches)
    logits = torch.cat([teacher(batch) for batch in batches])
    return flow, flow.data(1), Suffix(flow, 1, units[-1].path, logits, features)


def test_squared_error_is_a_sum_over_values_and_a_mean_over_images():
    z, y, w = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.rand(3, 2, 4)
    assert float(squared_error(z, y)) == pytest.approx(
        sum(float((a - b) ** 2) for a, b in zip(z.flatten(), y.flatten(), strict=True)) / 3
    )
    torch.testing.assert_close(squared_error(z, y, w), ((z - y) ** 2 * w).sum((1, 2)).mean())


def test_divergence_is_that_of_kullback_and_leibler():
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    p, q = (b / 2).softmax(-1), (a / 2).softmax(-1)
    twin = sum(float(p[i, j]) * math.log(float(p[i, j] / q[i, j])) for i in range(5) for j in range(4)) / 5
    assert float(CLASSES.divergence(b, a, 2.0)) == pytest.approx(twin, rel=1e-4)
    assert float(CLASSES.divergence(b, b)) == pytest.approx(0, abs=1e-6)


def test_gradients_are_those_of_the_float_network_behind_the_rounded_unit(place):
    flow, data, suffix = place
    outputs, gradients = output_gradients(flow, 1, data, suffix)
    torch.testing.assert_close(outputs, flow.run("student", 1, data.quantized))
    path, found = flow.units[1].path, []

    def swap(module, args, out):
        found.append(outputs.clone().requires_grad_())
        return found[0]

    handle = flow.teacher.get_submodule(path).register_forward_hook(swap)
    logits = flow.teacher(torch.cat(list(flow.batches)))
    handle.remove()
    p = suffix.reference.softmax(-1)
    (p * (p.log() - F.log_softmax(logits, -1))).sum().backward()
    torch.testing.assert_close(gradients, found[0].grad, atol=1e-6, rtol=1e-3)


def test_the_least_squares_diagonal_finds_the_hessian():
    h = torch.rand(6, 5) + 0.1
    d = torch.randn(50, 6, 5)
    torch.testing.assert_close(least_squares_diagonal(h * d, d), h / h.mean())
    noisy = least_squares_diagonal(torch.where(h < 0.3, -1.0, 1.0) * h * d, d)
    assert noisy.min() == pytest.approx(0.01)


def test_first_divides_by_the_first_value_of_each_name():
    first = First()
    assert float(first("a", torch.tensor(4.0))) == 1.0
    assert float(first("b", torch.tensor(2.0))) == 1.0
    assert float(first("a", torch.tensor(6.0))) == 1.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_least_at_the_target_and_has_a_gradient(place, name):
    flow, data, suffix = place
    objective = make_objective(name, flow, 1, data, suffix)
    places = torch.tensor([0, 3, 6])
    z, y = flow.run("student", 1, data.quantized[places]).clone().requires_grad_(), data.target[places]
    loss = objective(z, y, places)
    loss.backward()
    assert z.grad.abs().sum() > 0
    assert float(objective(y.clone(), y, places)) == pytest.approx(0.0, abs=1e-5)
    assert float(loss) > 1e-3


def test_prediction_difference_and_features_are_sums_of_terms_that_begin_at_one(place):
    flow, data, suffix = place
    places = torch.tensor([0, 1])
    z = flow.run("student", 1, data.quantized[places])
    assert float(make_objective("pd", flow, 1, data, suffix)(z, data.target[places], places)) == pytest.approx(2.0)
    assert float(make_objective("glf", flow, 1, data, suffix)(z, data.target[places], places)) == pytest.approx(3.0)


def test_an_unknown_name_is_refused():
    with pytest.raises(PlanishError, match=r"is 'mse': choose one of local, fisher, pd, lsh, glf"):
        check_objective("mse")
