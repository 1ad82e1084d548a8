"""MEC-Quant: what is coded, what is added to the objective, and what it changes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from planish.errors import PlanishError
from planish.network import assign, taps_of, watch
from planish.qat import QATSettings, train_quantized
from planish.qat.mec import MEC, MaximumEntropyCoding
from planish.qat.method import Context
from planish.qat.prepare import insert_quantizers
from planish.training import Ingredient, Interrupted
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=1))
MODELS = {"conv": (tiny.conv, 8), "vit": (tiny.vit, 16)}


def images(size, n=6):
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(1))


def ready(name="conv", scheme="w2a2", model=None, size=None):
    make, size = MODELS[name] if model is None else (lambda: model, size)
    student, x = make(), images(size)
    plan = assign(watch(student, x[:1]), scheme)
    taps = insert_quantizers(student, [x], plan, MEC())
    given = MODELS[name][0]() if model is None else tiny.conv()
    return Context(student.eval(), given.eval(), plan, taps), x


def stub(progress=0.0):
    return SimpleNamespace(accelerator=Accelerator(cpu=True), progress=progress)


def value(context, x, gamma=1.0, progress=0.0, **options):
    return loss_of(MaximumEntropyCoding(context, gamma, **options), context, x, progress)


def loss_of(term, context, x, progress=0.0):
    run = stub(progress)
    term.start(run)
    term.before_part(run, x, None)
    loss = term.loss(run, x, None, context.model(x))
    term.finish(run)
    return loss


def entering_head(model, x):
    """What enters the last layer, seen without the code under test."""
    kept = []
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    handle = head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].detach()))
    model(x)
    handle.remove()
    return kept[0].double().numpy()


def twin(z, eps2, p=None, gates=None):
    """R / R_max, R = sum_k (n_k + d)/2 logdet(I + d/(n_k eps^2) P^T diag(pi_k) Z); R_max: all eigenvalues equal."""
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    p = z if p is None else p / np.linalg.norm(p, axis=1, keepdims=True)
    m, d = z.shape
    gates = np.ones((m, 1)) if gates is None else gates
    total = most = 0.0
    for gate in gates.T:
        n = gate.sum()
        total += (n + d) / 2 * np.linalg.slogdet(np.eye(d) + d / (n * eps2) * p.T @ np.diag(gate) @ z)[1]
        rank = min(n, d)
        most += (n + d) / 2 * rank * math.log(1 + d / (rank * eps2))
    return total / most


def halves(z):
    """Gates of two experts: the rows of the smaller and of the larger norms."""
    large = np.argsort(np.argsort(np.linalg.norm(z, axis=1))) >= -(-len(z) // 2)
    return np.stack([~large, large], 1).astype(float)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eps2", [0.1, 4.0])
def test_features(name, eps2):
    context, x = ready(name)
    student, teacher = entering_head(context.model, x), entering_head(context.given, x)
    assert not np.allclose(student, teacher)
    assert value(context, x, 0.5, eps2=eps2).item() == pytest.approx(-0.5 * twin(student, eps2), rel=1e-4)
    two = value(context, x, eps2=eps2, views="teacher").item()
    assert two == pytest.approx(-twin(student, eps2, teacher), rel=1e-4)
    experts = value(context, x, eps2=eps2, experts=2).item()
    assert experts == pytest.approx(-twin(student, eps2, gates=halves(student)), rel=1e-4)
    both = value(context, x, eps2=eps2, experts=2, views="teacher").item()
    assert both == pytest.approx(-twin(student, eps2, teacher, gates=halves(student)), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_weights_as_they_are_rounded(name):
    context, x = ready(name)
    taps = dict(taps_of(context.model))
    expected = []
    for site, parameter, _ in context.weights().values():
        rows = taps[site.name](parameter).detach().flatten(1).double().numpy()
        assert (rows != 0).any(1).all()
        expected.append(twin(rows, 1.0))
    assert value(context, x, target="weights").item() == pytest.approx(-np.mean(expected), rel=1e-4)
    features = value(context, x).item()
    assert value(context, x, target="both").item() == pytest.approx(-np.mean(expected) + features, rel=1e-4)


def test_the_features_of_a_convolution_are_its_channels_and_positions_its_rows():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    context, x = ready(model=model, size=8)
    maps = nn.Sequential(*list(model)[:4])(x).detach()
    assert maps.shape == (6, 6, 4, 4)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norms > 0, norms, 1)
    expected = np.linalg.slogdet(np.eye(6) + 6 / len(rows) * unit.T @ unit)[1] / (6 * math.log(2))
    assert value(context, x).item() == pytest.approx(-expected, rel=1e-4)


@pytest.mark.parametrize("target", ["features", "weights", "both"])
@pytest.mark.parametrize("order", [None, 4])
def test_one_expert_is_none_and_gradients_reach_every_parameter_before(target, order):
    context, x = ready("conv")
    one = value(context, x, target=target, experts=1, order=order)
    assert torch.equal(one, value(context, x, target=target, order=order))
    one.backward()
    touched = {n for n, p in context.model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert "4.weight" in touched
    assert ("9.weight" in touched) == (target != "features")
    assert "0.weight" in touched


def test_no_gradient_reaches_the_teacher_and_the_given_network_stays_as_it_was():
    context, x = ready("conv")
    value(context, x, views="teacher").backward()
    assert all(p.grad is None for p in context.given.parameters())
    assert tiny.same(context.given, tiny.conv())
    assert not list(taps_of(context.given))


@pytest.mark.parametrize("target", ["features", "weights"])
def test_dead_rows_have_finite_gradients(target):
    context, x = ready("conv")
    with torch.no_grad():
        context.model[4]._parameters["weight"][2] = 0
        context.model[5].weight.zero_()  # all features are zero, as well
        context.model[5].bias.zero_()
    value(context, x, target=target, experts=2).backward()
    grads = [p.grad for p in context.model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", MODELS)
def test_without_weight_it_is_lsq_bit_for_bit(name):
    make, size = MODELS[name]
    batches = tiny.loader(size=size)
    plain = train_quantized(make(), batches, "w2a2", "lsq", settings=SETTINGS)
    assert tiny.same(train_quantized(make(), batches, "w2a2", MEC(gamma=0.0), settings=SETTINGS), plain)
    method = MEC(gamma=1.0, target="both", views="teacher", experts=2)
    assert not tiny.same(train_quantized(make(), batches, "w2a2", method, settings=SETTINGS), plain)
    # the forward passes of the teacher and the looks at the taps change nothing of their own
    faint = MEC(gamma=1e-30, target="both", views="teacher", experts=2)
    assert tiny.same(train_quantized(make(), batches, "w2a2", faint, settings=SETTINGS), plain)


@pytest.mark.parametrize(
    ("option", "setting"),
    [("gamma", 2.0), ("target", "both"), ("experts", 2), ("eps2", 0.5), ("order", 2), ("views", "single"),
     ("until", 0.9)],
)  # fmt: skip
def test_every_option_of_the_method_reaches_the_term(option, setting):
    context, x = ready("conv")

    def of_method(**options):
        return loss_of(MEC(**options).ingredients(context)[-1], context, x, progress=0.25)

    options = {"gamma": 10.0, "experts": 4, "eps2": 64.0, "views": "teacher", option: setting}
    assert torch.equal(of_method(**{option: setting}), value(context, x, progress=0.25, **options))
    assert not torch.equal(of_method(**{option: setting}), of_method())


def test_the_weight_fades():
    context, x = ready("conv")
    full = value(context, x).item()
    assert value(context, x, progress=0.25, until=0.5).item() == pytest.approx(full / 2)
    assert value(context, x, progress=0.5, until=0.5) is None
    assert value(context, x, progress=0.9).item() == pytest.approx(full)


@pytest.mark.parametrize("target", ["features", "weights"])
def test_training_with_it_raises_the_share(target):
    def share(gamma):
        last = {}

        class Look(Ingredient):
            def start(self, run):
                modules = dict(taps_of(run.model))
                name = "9.input" if target == "features" else "4.weight"
                tap = modules[name]
                if target == "features":
                    tap.register_forward_pre_hook(lambda m, inputs: last.__setitem__("rows", inputs[0].detach()))
                else:
                    tap.register_forward_hook(lambda m, i, out: last.__setitem__("rows", out.detach().flatten(1)))

        method = MEC(gamma=gamma, target=target, eps2=0.5, views="single")
        train_quantized(tiny.conv(), tiny.loader(), "w4a4", method, settings=SETTINGS, epochs=10, extra=[Look()])
        return twin(last["rows"].double().numpy() + 1e-9, 0.5)

    assert share(30.0) > share(0.0) + 0.01


def test_interrupted_and_resumed_it_is_the_same(tmp_path):
    method = MEC(gamma=1.0, target="both", views="teacher", experts=2, until=0.8)
    settings = QATSettings(averaging=None, training=tiny.settings(epochs=2))
    whole = train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=settings)
    steps = []

    def stop():
        steps.append(1)
        return len(steps) == 8

    options = {"settings": settings, "checkpoint_dir": tmp_path / "c"}
    with pytest.raises(Interrupted):
        train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, should_stop=stop, **options)
    resumed = train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, resume=True, **options)
    assert tiny.same(whole, resumed)


def test_nothing_is_left_on_the_taps():
    context, x = ready("conv")
    value(context, x, target="both", views="teacher")
    assert not any(tap._forward_hooks or tap._forward_pre_hooks for tap in context.taps.values())


def test_errors():
    context, _ = ready("conv")
    for options, message in [
        ({"target": "logits"}, "the target of mec is 'logits': choose one of features, weights, both"),
        ({"views": "three"}, "the views of mec is 'three'"),
        ({"experts": 0}, "0 experts"),
        ({"order": 3}, "order 3: give an even number"),
        ({"eps2": -1.0}, "eps2 of -1.0: it is positive"),
        ({"until": 0.0}, "zero after 0.0 of the run"),
    ]:
        with pytest.raises(PlanishError, match=message):
            MaximumEntropyCoding(context, 1.0, **options)
    with pytest.raises(PlanishError, match=r"gamma=-5\.0: it is positive, or 0"):
        MaximumEntropyCoding(context, -5.0)
