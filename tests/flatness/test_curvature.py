"""The whole measurement: on subjects and modules, exact and estimated, alone and in two processes."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from planish.errors import PlanishError
from planish.flatness.curvature import curvature
from planish.flatness.subject import Subject
from planish.network import detach
from tests.flatness import two_processes
from tests.flatness.hessians import dense_hessian, double_problem, true_hessian
from tests.flatness.networks import attention_net, conv_net, images
from tests.flatness.quadratic import Quadratic, mean_output, nothing
from tests.processes import finish, start_two


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_a_small_network_is_exact(make):
    model = make()
    found = curvature(model, batches=images(model, 20, 12))
    matrix = true_hessian(make)
    values = torch.linalg.eigvalsh(matrix)
    assert found.trace.value == pytest.approx(matrix.trace().item(), rel=1e-4)
    assert found.trace.error == 0
    assert found.eigenvalues == pytest.approx(values.flip(0)[:5].tolist(), rel=1e-4)
    assert found.residuals == [0] * 5
    assert found.lowest == pytest.approx(values[0].item(), rel=1e-3)
    parts = matrix.diagonal().split([p.numel() for p in model.parameters()])
    assert [layer.trace for layer in found.layers] == pytest.approx([p.sum().item() for p in parts], rel=1e-3, abs=1e-5)
    assert [layer.layer for layer in found.layers] == [name for name, _ in model.named_parameters()]
    assert [layer.weights for layer in found.layers] == [p.numel() for p in model.parameters()]
    assert (found.weights, found.images, found.probes, found.steps) == (len(matrix), 20, len(matrix), 0)


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_estimates_agree_with_it(make):
    model = make()
    found = curvature(model, batches=images(model, 20, 12), exact=0, probes=20, steps=100)
    matrix = true_hessian(make)
    assert abs(found.trace.value - matrix.trace().item()) <= 4 * found.trace.error
    assert 0 < found.trace.error < 0.2 * found.trace.value
    assert found.eigenvalues == pytest.approx(torch.linalg.eigvalsh(matrix).flip(0)[:5].tolist(), rel=1e-4)
    assert sum(layer.trace for layer in found.layers) == pytest.approx(found.trace.value)
    assert found.probes == 20
    assert 5 < found.steps < 100


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_a_subject_is_its_folded_network(make):
    model = make()
    subject = Subject.prepare(model, images(model, 20, 12), ["w4a4"])
    before = [p.requires_grad for p in subject.model.parameters()]
    found = curvature(subject)
    assert [p.requires_grad for p in subject.model.parameters()] == before
    plain = copy.deepcopy(subject.model)
    detach(plain)
    names = [layer.layer for layer in found.layers]
    assert names == [site.name for site in subject.sites if site.is_weight]
    matrix = dense_hessian(plain.double(), [(x.double(), y) for x, y in subject.batches], names)
    assert found.trace.value == pytest.approx(matrix.trace().item(), rel=1e-4)
    assert found.eigenvalues == pytest.approx(torch.linalg.eigvalsh(matrix).flip(0)[:5].tolist(), rel=1e-4)
    assert found.weights == len(matrix) < sum(p.numel() for p in plain.parameters())


def test_parameters_and_batches_of_a_subject_can_be_chosen():
    model = conv_net()
    subject = Subject.prepare(model, images(model), ["w4a4"])
    chosen = dict(list(subject.model.named_parameters())[:1])
    found = curvature(subject, parameters=chosen, batches=subject.batches[:1])
    assert [layer.layer for layer in found.layers] == list(chosen)
    assert found.images == 16


def test_rounded_networks_are_refused():
    model = conv_net()
    subject = Subject.prepare(model, images(model), ["w4a4"])
    with subject.tapped(subject.quantizers["w4a4"]), pytest.raises(PlanishError, match="a tap is switched in"):
        curvature(subject)


def test_a_flat_loss_has_no_curvature():
    for exact in (0, 100):
        found = curvature(Quadratic(torch.zeros(30), 3), batches=nothing(), loss=mean_output, exact=exact, probes=3)
        assert found.trace.value == found.trace.error == found.lowest == 0
        assert found.eigenvalues == [0] * 5
        assert torch.tensor(found.density.y).isfinite().all()


def test_more_eigenvalues_than_weights():
    found = curvature(Quadratic(torch.tensor([1.0, 2.0])), batches=nothing(), loss=mean_output, exact=0, probes=2)
    assert found.eigenvalues == pytest.approx([2, 1])
    assert found.trace.value == pytest.approx(3)


def test_runs_go_into_the_density_alone():
    model, batches = double_problem(attention_net)
    one, two = (curvature(model, batches=batches, exact=0, probes=2, steps=30, runs=runs) for runs in (1, 2))
    assert one.eigenvalues == two.eigenvalues
    assert one.trace == two.trace
    assert one.density != two.density


def test_the_seed_decides():
    model, batches = double_problem(conv_net)
    a, b, c = (curvature(model, batches=batches, exact=0, probes=2, steps=10, seed=seed) for seed in (0, 0, 1))
    assert a == b
    assert a.trace != c.trace


def test_progress_and_json():
    model, batches = double_problem(conv_net)
    seen = []
    found = curvature(
        model, batches=batches, exact=0, probes=3, steps=8, runs=2, per_layer=False,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(done, 3 + 8 * 2) for done in range(1, 20)]
    assert found.layers == []
    assert json.loads(json.dumps(dataclasses.asdict(found)))["trace"]["value"] == found.trace.value


def test_errors():
    with pytest.raises(PlanishError, match="pass batches"):
        curvature(conv_net())
    for name in ("probes", "steps", "runs", "eigenvalues"):
        with pytest.raises(PlanishError, match=f"{name} is 0"):
            curvature(conv_net(), batches=images(conv_net()), **{name: 0})


@pytest.fixture(scope="module")
def processes():
    running = start_two("tests.flatness.two_processes")
    try:
        alone = two_processes.main()
    except BaseException:
        for process in running:
            process.kill()
        raise
    return [*(json.loads(out.splitlines()[-1]) for out, _ in finish(running)), alone]


@pytest.mark.parametrize("what", ["shared", "lonely"])
def test_two_processes_measure_what_one_does(processes, what):
    first, second, alone = processes
    assert (first["world"], alone["world"]) == (2, 1)
    assert first == second
    both, one = first[what], alone[what]
    assert both["images"] == one["images"] == 40
    assert both["trace"]["value"] == pytest.approx(one["trace"]["value"], rel=1e-5)
    assert both["eigenvalues"] == pytest.approx(one["eigenvalues"], rel=1e-5)
    traces = ([layer["trace"] for layer in found["layers"]] for found in (both, one))
    assert next(traces) == pytest.approx(next(traces), rel=1e-4, abs=1e-5)
