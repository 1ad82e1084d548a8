"""FPQ against its equations, and the properties that they have."""

import copy

import pytest
import torch

from planish.errors import PlanishError
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.fpq import (
    FPQ,
    ChannelStandardizedDistillation,
    FeaturePerturbation,
    perturb,
    standardize,
    standardized_distance,
)
from planish.quantizers import LearnedQuantizer, fit_grid
from planish.scheme import Format
from planish.training import Ingredient
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
    tokens = student.permute(0, 2, 3, 1).reshape(5, 16, 3), teacher.permute(0, 2, 3, 1).reshape(5, 16, 3)
    torch.testing.assert_close(standardized_distance(*tokens, "sum"), total)


def test_distance_is_pearsons_correlation():
    student, teacher = draw(6, 4, 3, 3), draw(6, 4, 3, 3, seed=1)
    rho = torch.stack(
        [torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1] for c in range(4)]
    )
    exact = (standardize(teacher, 0.0) - standardize(student, 0.0)).square().sum()
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


def test_gradients_flow_to_the_student_only():
    class Watch(Ingredient):
        def after_step(self, run):
            self.teachers = [p.grad for p in distillation.teacher.parameters()]
            self.training = distillation.teacher.training

    teacher, watch = tiny.conv(), Watch()
    distillation = ChannelStandardizedDistillation(copy.deepcopy(teacher), ["0", "4", "9"])
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


def test_no_hook_is_left():
    model = tiny.conv()
    trained = train_quantized(model, tiny.loader(), "w4a4", FPQ(p=1.0), settings=SETTINGS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.modules())


def test_errors():
    with pytest.raises(PlanishError, match=r"in \[0, 1\]"):
        FeaturePerturbation({}, 1.5)
    with pytest.raises(PlanishError, match="after or before"):
        FeaturePerturbation({}, 0.5, "beside")
    with pytest.raises(PlanishError, match="mean, batch-mean, sum"):
        ChannelStandardizedDistillation(tiny.conv(), [], reduction="median")
