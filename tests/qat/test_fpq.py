"""FPQ against its equations, and the properties that they have."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.features import Outputs
from planish.qat.fpq import (
    FPQ,
    ChannelStandardizedDistillation,
    FeaturePerturbation,
    _ChannelDistance,
    perturb,
    standardize,
    standardized_distance,
)
from planish.quantizers import LearnedQuantizer, fit_grid
from planish.scheme import Format
from planish.training import Ingredient, Interrupted
from planish.training.engine import step_seed
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=1))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_has_mean_zero_the_variance_of_rounding_and_stays_within_half_a_step():
    torch.manual_seed(0)
    noise = perturb(torch.zeros(200_000), torch.tensor(0.4))
    assert noise.abs().max() <= 0.2
    assert abs(noise.mean()) < 4 * 0.4 / (12 * 200_000) ** 0.5
    assert noise.var().item() == pytest.approx(0.4**2 / 12, rel=0.01)


def test_no_gradient_reaches_the_step_through_the_noise():
    x, step = torch.zeros(5, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    perturb(x, step).sum().backward()
    assert step.grad is None
    assert torch.equal(x.grad, torch.ones(5))


def started(x):
    tap = LearnedQuantizer(Format(4, "tensor", symmetric=False), per_image=True)
    tap.initialize(x, fit_grid(x, tap.format))
    return tap


@pytest.mark.parametrize(("p", "position"), [(0.3, "after"), (0.3, "before"), (1.0, "after"), (0.0, "after")])
def test_the_gate_opens_with_probability_p_for_the_whole_tensor(p, position):
    x = draw(8, 20).float()
    tap = started(x)
    clean = tap(x)
    noise = FeaturePerturbation({"x": tap}, p, position)
    noise.start(None)
    torch.manual_seed(1)
    changed = [not torch.equal(tap(x), clean) for _ in range(400)]
    assert sum(changed) / 400 == pytest.approx(p, abs=0.08)
    if position == "after" and p == 1:
        difference = tap(x) - clean
        assert (difference != 0).float().mean() > 0.99
        assert difference.abs().max() <= tap.grid.scale / 2 + 1e-6
    if position == "before" and p:
        assert set(tap(x).unique().tolist()) <= set(torch.arange(-15, 16).mul(tap.grid.scale).tolist()) | set(
            clean.unique().tolist()
        )
    tap.eval()
    assert torch.equal(tap(x), clean)
    tap.train()
    noise.finish(None)
    assert torch.equal(tap(x), clean)


def test_before_the_quantizer_it_is_unbiased_rounding():
    torch.manual_seed(0)
    x = torch.full((4000,), 0.37)
    tap = started(torch.linspace(-1, 1, 100))
    noise = FeaturePerturbation({"x": tap}, 1.0, "before")
    noise.start(None)
    rounded = tap(x)
    assert len(rounded.unique()) == 2
    assert rounded.mean().item() == pytest.approx(0.37, abs=4 * tap.grid.scale.item() / 4000**0.5)


def csd_twin(student, teacher):
    """The sum over channels of the squared distance of standardized channels, one channel after the other."""
    total = 0.0
    for c in range(student.shape[1]):
        z = [(t[:, c] - t[:, c].mean()) / t[:, c].var(unbiased=False).add(1e-5).sqrt() for t in (teacher, student)]
        total = total + (z[0] - z[1]).square().sum()
    return total


def test_distance_is_that_of_the_formula():
    student, teacher = draw(5, 3, 4, 4), draw(5, 3, 4, 4, seed=1)
    torch.testing.assert_close(standardized_distance(student, teacher, "sum").double(), csd_twin(student, teacher))
    total = standardized_distance(student, teacher, "sum")
    torch.testing.assert_close(standardized_distance(student, teacher, "mean"), total / student.numel())
    torch.testing.assert_close(standardized_distance(student, teacher, "batch-mean"), total / 5)
    # channels last, as linear layers have them: tokens, and the maps of Swin
    last = student.permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1)
    torch.testing.assert_close(standardized_distance(*last, "sum", -1), total)
    tokens = [t.reshape(5, 16, 3) for t in last]
    torch.testing.assert_close(standardized_distance(*tokens, "sum", -1), total)


def test_distance_is_pearsons_correlation():
    student, teacher = draw(6, 4, 3, 3), draw(6, 4, 3, 3, seed=1)
    rho = torch.stack(
        [torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1] for c in range(4)]
    )
    exact = (standardize(teacher, eps=0.0) - standardize(student, eps=0.0)).square().sum()
    torch.testing.assert_close(exact, 2 * 54 * (1 - rho).sum(), rtol=1e-12, atol=0)


def test_a_positive_affine_copy_is_no_distance_and_a_flipped_one_the_largest():
    z = draw(6, 4, 3, 3)
    gain, shift = draw(4).abs().add(0.5)[:, None, None], draw(4)[:, None, None]
    assert standardized_distance(gain * z + shift, z) < 1e-6
    assert standardized_distance(-z, z).item() == pytest.approx(4.0, rel=1e-4)


def test_a_constant_channel_makes_no_nan():
    z = torch.zeros(3, 2, 4, 4, requires_grad=True)
    standardized_distance(z, draw(3, 2, 4, 4)).backward()
    assert torch.isfinite(z.grad).all()


def test_the_gradient_written_out_is_that_of_the_formula():
    student, teacher = draw(5, 3, 4, 4).requires_grad_(), draw(5, 3, 4, 4, seed=1)
    for axis, dims in ((1, [0, 2, 3]), (-1, [0, 1, 2])):
        target = standardize(teacher, axis)
        assert torch.autograd.gradcheck(lambda z, t=target, d=dims: _ChannelDistance.apply(z, t, d), student)
    far = (draw(5, 3, 4, 4).float() + 100).requires_grad_()  # a mean of a hundred deviations, in float32
    standardized_distance(far, teacher, "sum").backward()
    exact = far.detach().double().requires_grad_()
    csd_twin(exact, teacher).backward()
    torch.testing.assert_close(far.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_outputs_are_copied_where_something_works_in_place_on_them():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), torch.randn(3, 4)
    first, second = model[0](x), model(x)
    outputs = Outputs(model, ["0", "2"])
    for step in range(3):
        got = model(x)
        assert (outputs.kept["2"] is got) == (step > 0)  # nobody changes it, which the first step shows
        seen = outputs.take()
        assert torch.equal(seen["0"], first)
        assert torch.equal(seen["2"], second)
    model(x).mul_(2)
    assert set(outputs.take()) == {"0"}  # lost, and known to be
    model(x).mul_(2)
    assert torch.equal(outputs.take()["2"], second)
    with torch.inference_mode():
        model(x)
    assert torch.equal(outputs.take()["0"], first)


def test_gradients_flow_to_the_student_only():
    class Watch(Ingredient):
        def after_step(self, run):
            self.teachers = [p.grad for p in distillation.teacher.parameters()]
            self.training = distillation.teacher.training

    teacher, watch = tiny.conv(), Watch()
    distillation = ChannelStandardizedDistillation(copy.deepcopy(teacher), {"0": 1, "4": 1, "9": -1})
    model = tiny.conv(seed=1)
    before = copy.deepcopy(model)
    tiny.fit(model, [distillation, watch], task=False, run_settings=tiny.settings(epochs=1))
    assert not tiny.same(model, before)
    assert all(grad is None for grad in watch.teachers)
    assert not watch.training
    assert tiny.same(distillation.teacher, teacher)


@pytest.mark.parametrize(("make", "size"), [(tiny.conv, 8), (tiny.vit, 16)])
def test_without_noise_and_distillation_it_is_lsq_bit_for_bit(make, size):
    batches = tiny.loader(size=size)
    lsq = train_quantized(make(), batches, "w2a4", Method(), settings=SETTINGS)
    off = train_quantized(make(), batches, "w2a4", FPQ(p=0.0, csd=0.0), settings=SETTINGS)
    full = train_quantized(make(), batches, "w2a4", FPQ(p=0.5), settings=SETTINGS)
    assert tiny.same(lsq, off)
    assert not tiny.same(lsq, full)


def test_zero_points_stay_and_steps_move():
    seen = {}

    class Watch(Ingredient):
        def start(self, run):
            self.taps = {n: t for n, t in run.model.named_modules() if isinstance(t, LearnedQuantizer)}
            seen["before"] = {n: (t.scale.detach().clone(), t.zero_point.clone()) for n, t in self.taps.items()}

        def finish(self, run):
            seen["after"] = {n: (t.scale.detach().clone(), t.zero_point.clone()) for n, t in self.taps.items()}

    train_quantized(tiny.vit(), tiny.loader(size=16), "w4a4", FPQ(), settings=SETTINGS, extra=[Watch()])
    before, after = seen["before"], seen["after"]
    assert all(torch.equal(before[n][1], after[n][1]) for n in before)
    assert sum(not torch.equal(before[n][0], after[n][0]) for n in before) > len(before) / 2


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


class Watching(Ingredient):
    """Keeps the network, and fails at a given step."""

    def __init__(self, fail=None):
        self.fail = fail

    def start(self, run):
        self.model = run.model
        if self.fail == 0:
            raise ZeroDivisionError

    def after_step(self, run):
        self.taken = copy.deepcopy(run.model)
        if self.fail:
            raise ZeroDivisionError


@pytest.mark.parametrize("position", ["after", "before"])
def test_no_hook_is_left(position):
    method, watching = FPQ(p=1.0, position=position), Watching()
    train_quantized(tiny.conv(), tiny.loader(), "w4a4", method, settings=SETTINGS, extra=[watching])
    assert not hooks(watching.model)
    assert hooks(watching.taken)  # there was something to take off


@pytest.mark.parametrize("step", [0, 1])
def test_a_failure_keeps_its_name_and_leaves_no_hook(step):
    watching = Watching(fail=step)
    with pytest.raises(ZeroDivisionError):
        train_quantized(tiny.conv(), tiny.loader(), "w4a4", FPQ(p=1.0), settings=SETTINGS, extra=[watching])
    assert not hooks(watching.model)


def test_a_failure_before_it_has_started_is_not_hidden():
    distillation = ChannelStandardizedDistillation(tiny.conv(), {"0": 1})
    with pytest.raises(ZeroDivisionError):
        tiny.fit(tiny.conv(), [Watching(fail=0), distillation, FeaturePerturbation({})])


@pytest.mark.parametrize("position", ["after", "before"])
def test_a_copy_of_the_student_is_neither_perturbed_nor_seen(position):
    x = draw(8, 20).float()
    tap = started(x)
    clean = tap(x)
    noise = FeaturePerturbation({"x": tap}, 1.0, position)
    noise.start(None)
    teacher = copy.deepcopy(tap)
    assert teacher.training
    assert torch.equal(teacher(x), clean)
    assert not torch.equal(tap(x), clean)
    noise.finish(None)

    model = tiny.conv()
    outputs = Outputs(model, ["0"])
    mine = model[0](x[:, :16].reshape(8, 1, 4, 4))
    copy.deepcopy(model)(draw(2, 1, 8, 8).float())
    assert torch.equal(outputs.take()["0"], mine)


def test_only_layers_with_a_weight_are_perturbed_and_distilled():
    class Keep(FPQ):
        def ingredients(self, context):
            parts = super().ingredients(context)
            seen["noisy"] = set(next(i for i in parts if isinstance(i, FeaturePerturbation)).taps)
            seen["layers"] = next(i for i in parts if isinstance(i, ChannelStandardizedDistillation)).layers
            return parts

    seen = {}
    train_quantized(tiny.vit(), tiny.loader(size=16), "w4a4", Keep(), settings=SETTINGS, epochs=0)
    names = [f"blocks.{b}.{layer}" for b in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert list(seen["layers"]) == ["patch_embed.proj", *names, "head"]
    assert seen["layers"]["patch_embed.proj"] == 1
    assert {seen["layers"][name] for name in (*names, "head")} == {-1}
    assert seen["noisy"] == {f"{name}.input" for name in ("patch_embed.proj", *names, "head")}


def step_twin(quantized, teacher, images, labels, p, position, reduction, seed):
    """The loss of a step, spelled out: gate and noise at every quantizer of a layer's input, cross-entropy, and the
    standardized distances of the layers' outputs."""
    ours, theirs, paths = {}, {}, ["0", "4", "9"]

    def noisy(tap, x):
        if torch.rand(()) < p:
            return x + (torch.rand(x.shape) - 0.5) * tap.grid.scale
        return x

    for path in paths:
        tap = quantized.get_submodule(path).planish_taps["input"]
        if position == "after":
            tap.register_forward_hook(lambda tap, args, out: noisy(tap, out))
        else:
            tap.register_forward_pre_hook(lambda tap, args: noisy(tap, args[0]))
        for model, kept in ((quantized, ours), (teacher, theirs)):
            model.get_submodule(path).register_forward_hook(
                lambda m, a, out, kept=kept, path=path: kept.__setitem__(path, out)
            )
    teacher.eval()(images)
    torch.manual_seed(seed)
    logits = quantized.eval()(images)
    chosen = -torch.stack([logits[i].log_softmax(-1)[label] for i, label in enumerate(labels)]).mean()
    divisors = {
        "mean": {path: 3 * ours[path].numel() for path in paths},  # of the layers, too
        "batch-mean": dict.fromkeys(paths, len(images)),
        "sum": dict.fromkeys(paths, 1),
    }
    return chosen + 2.5 * sum(csd_twin(ours[path], theirs[path]) / divisors[reduction][path] for path in paths)


@pytest.mark.parametrize(
    ("p", "position", "reduction"),
    [(0.0, "after", "mean"), (0.5, "after", "mean"), (1.0, "after", "mean"), (1.0, "before", "mean"),
     (0.0, "after", "batch-mean"), (0.0, "after", "sum")],
)  # fmt: skip
def test_a_step_minimises_what_the_equations_say(p, position, reduction):
    run_settings = replace(SETTINGS, training=tiny.settings(epochs=1, freeze_batchnorm=True))
    given, batches, losses = tiny.conv(), tiny.loader(shuffle=False), []
    start = train_quantized(given, batches, "w2a4", Method(), settings=run_settings, epochs=0)
    method = FPQ(p=p, position=position, csd=2.5, reduction=reduction)
    train_quantized(given, batches, "w2a4", method, settings=run_settings, progress=lambda s, n, x: losses.append(x))
    images, labels = next(iter(batches))
    twin = step_twin(start, copy.deepcopy(given), images, labels, p, position, reduction, step_seed(0, 0, 0))
    assert losses[0] == pytest.approx(twin.item(), rel=1e-5)


def test_an_interrupted_run_comes_to_the_same_end(tmp_path):
    method, batches = FPQ(p=0.5), tiny.loader()
    whole = train_quantized(tiny.conv(), batches, "w2a4", method, settings=SETTINGS)
    steps = []
    with pytest.raises(Interrupted):
        train_quantized(
            tiny.conv(), batches, "w2a4", method, settings=SETTINGS, checkpoint_dir=tmp_path,
            should_stop=lambda: steps.append(1) or len(steps) == 3,
        )  # fmt: skip
    resumed = train_quantized(
        tiny.conv(), batches, "w2a4", method, settings=SETTINGS, checkpoint_dir=tmp_path, resume=True
    )
    assert tiny.same(whole, resumed)


def test_errors():
    with pytest.raises(PlanishError, match=r"in \[0, 1\]"):
        FeaturePerturbation({}, 1.5)
    with pytest.raises(PlanishError, match="after or before"):
        FeaturePerturbation({}, 0.5, "beside")
    with pytest.raises(PlanishError, match="mean, batch-mean, sum"):
        ChannelStandardizedDistillation(tiny.conv(), {"0": 1}, reduction="median")
    with pytest.raises(PlanishError, match="mean, batch-mean, sum"):
        standardized_distance(torch.ones(2, 3), torch.ones(2, 3), "median")
    with pytest.raises(PlanishError, match="positive, or 0"):
        ChannelStandardizedDistillation(tiny.conv(), {"0": 1}, weight=-1.0)
    with pytest.raises(PlanishError, match="nothing to distil"):
        ChannelStandardizedDistillation(tiny.conv(), {})
