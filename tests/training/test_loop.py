import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from planish.errors import PlanishError
from planish.flattening import ActivationNoise, WeightNoise
from planish.flattening.weight_noise import KINDS
from planish.training import SAM, Averaging, Ingredient, Interrupted, TaskLoss, TrainingFailed, train
from planish.training.engine import step_seed
from tests.training import tiny


def reference_loop(model, batches, epochs, lr, warmup, decay, clip):
    """Plain fine-tuning spelled out: SGD with Nesterov momentum, linear warm-up then cosine, clipped gradients."""
    steps, step = epochs * len(batches), 0
    buffers = dict.fromkeys(model.parameters())
    first = max(1, round(warmup * steps))
    for epoch in range(epochs):
        batches.dataset.set_epoch(epoch)
        model.train()
        for images, labels in batches:
            rate = lr * (step + 1) / first if step < first else lr * 0.5 * (
                1 + math.cos(math.pi * (step - first) / (steps - first))
            )  # fmt: skip
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
            with torch.no_grad():
                for p in model.parameters():
                    g = p.grad * min(1.0, clip / (norm + 1e-6))
                    if p.dim() > 1:
                        g = g + decay * p
                    buffers[p] = g.clone() if buffers[p] is None else 0.9 * buffers[p] + g
                    p -= rate * (g + 0.9 * buffers[p])
            step += 1


def test_plain_training_equals_the_reference_loop():
    mine, twin = tiny.conv(), tiny.conv()
    # the clip norm is small, so that it acts
    tiny.fit(mine, run_settings=tiny.settings(weight_decay=0.01, warmup=0.2, clip_norm=0.5))
    reference_loop(twin, tiny.loader(), 2, 0.05, 0.2, 0.01, 0.5)
    assert not tiny.same(mine, tiny.conv())
    for (key, a), b in zip(mine.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=key)


def ingredients(kind, model):
    """Everything that holds state, around a model."""
    plan = tiny.plan(model)
    noise = lambda weights, activations: [  # noqa: E731
        WeightNoise(plan, weights, refresh=3),
        ActivationNoise(plan, activations, refresh=3),
    ]
    special = {"plain": [], "sam": [SAM(0.1)], "ema": [Averaging(0.9)], "swa": [Averaging(None, 0.3)]}
    if kind in special:
        return special[kind]
    if kind == "uniform":
        return noise("uniform", "uniform")
    return [*noise(kind, "residual" if kind == "residual" else "gaussian"), Averaging(0.9)]


@pytest.mark.parametrize("kind", ["plain", "sam", "ema", "swa", *(k for k in KINDS if k != "none")])
@pytest.mark.parametrize("stop", [3, 6, 8])  # in the first epoch, at its end, in the second
def test_resumed_run_is_bit_identical(kind, stop, tmp_path):
    def run(model, **options):
        return tiny.fit(model, ingredients(kind, model), run_settings=tiny.settings(epochs=2), **options)

    whole, parts = tiny.conv(dropout=0.3), tiny.conv(dropout=0.3)
    run(whole)
    done = []

    def should_stop():
        done.append(1)
        return len(done) == stop

    with pytest.raises(Interrupted):
        run(parts, checkpoint_dir=tmp_path / "c", should_stop=should_stop)
    again = tiny.conv(seed=5, dropout=0.3)  # other weights: everything must come from the checkpoint
    torch.manual_seed(stop)
    steps = []
    run(again, checkpoint_dir=tmp_path / "c", resume=True, progress=lambda step, *_: steps.append(step))
    assert steps == list(range(stop + 1, 13))
    assert tiny.same(again, whole)


def test_resume_with_adamw_and_a_stock_shuffling_loader(tmp_path):
    def run(model, **options):
        batches = DataLoader(tiny.data(), 4, shuffle=True)
        tiny.fit(model, [], batches, run_settings=tiny.settings(optimizer="adamw", lr=0.01), **options)

    whole, parts = tiny.mlp(), tiny.mlp()
    torch.manual_seed(1)
    run(whole)
    torch.manual_seed(2)
    calls = iter([False] * 7 + [True])
    with pytest.raises(Interrupted):
        run(parts, checkpoint_dir=tmp_path / "c", should_stop=lambda: next(calls))
    torch.manual_seed(3)
    run(parts, checkpoint_dir=tmp_path / "c", resume=True)
    assert tiny.same(whole, parts)


def test_resume_on_a_plain_list_of_batches(tmp_path):
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])) for _ in range(4)]
    whole, parts = tiny.conv(), tiny.conv()
    tiny.fit(whole, [], batches)
    calls = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        tiny.fit(parts, [], batches, checkpoint_dir=tmp_path / "c", should_stop=lambda: next(calls))
    tiny.fit(parts, [], batches, checkpoint_dir=tmp_path / "c", resume=True)
    assert tiny.same(whole, parts)


def test_a_finished_run_resumes_to_itself(tmp_path):
    model = tiny.conv()
    tiny.fit(model, [Averaging(0.9)], checkpoint_dir=tmp_path / "c")
    again = tiny.conv(seed=3)
    tiny.fit(again, [Averaging(0.9)], checkpoint_dir=tmp_path / "c", resume=True)
    assert tiny.same(model, again)


class Keep(Ingredient):
    """Remembers the weights after each step."""

    def __init__(self):
        self.seen = []

    def after_step(self, run):
        self.seen.append(copy.deepcopy(run.model.state_dict()))


@pytest.mark.parametrize("noise", [False, True])
def test_nan_stops_and_the_last_good_weights_are_kept(noise):
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])) for _ in range(4)]

    class Poisoned(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for i, (images, labels) in enumerate(list.__iter__(self)):
                bad = self.passes == 2 and i == 2
                yield (images * math.nan if bad else images), labels

    model, keep = tiny.conv(), Keep()
    plan = tiny.plan(model)
    extra = [WeightNoise(plan), ActivationNoise(plan, refresh=1), SAM()] if noise else []
    with pytest.raises(
        TrainingFailed, match=r"batch 3 of epoch 2 holds NaN.* at step 7 of 12.*last good weights"
    ) as caught:
        tiny.fit(model, [*extra, keep], Poisoned(batches), run_settings=tiny.settings(epochs=3))
    good = keep.seen[3]  # the end of the first epoch
    assert isinstance(caught.value, PlanishError)
    assert all(torch.equal(value, good[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, good[key]) for key, value in caught.value.state_dict.items())
    assert list(model.state_dict()) == list(tiny.conv().state_dict())
    assert type(model[0]) is nn.Conv2d


def test_infinite_second_pass_of_sam_is_noticed():
    """The loss is finite at the weights and infinite at the worst point nearby."""

    class Cliff(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, 4))

        def forward(self, x):
            return x.flatten(1)[:, :1] * torch.where(self.w.detach() == 1, self.w, self.w * math.inf)

    with pytest.raises(TrainingFailed):
        tiny.fit(Cliff(), [SAM(0.1)])


@pytest.mark.parametrize("refresh", [1, 50])
def test_bfloat16_leaves_no_wrapper(refresh):
    model = tiny.conv()
    before = set(vars(model))
    plan = tiny.plan(model)
    noise = [WeightNoise(plan, refresh=refresh), ActivationNoise(plan, refresh=refresh)]
    tiny.fit(model, noise, run_settings=tiny.settings(mixed_precision="bf16"))
    exact = tiny.conv()
    tiny.fit(exact, [WeightNoise(plan, refresh=refresh), ActivationNoise(plan, refresh=refresh)])
    assert set(vars(model)) == before
    assert list(model.state_dict()) == list(tiny.conv().state_dict())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert tiny.same(copy.deepcopy(model), model)
    assert not tiny.same(model, exact)  # it was computed in another precision ...
    for a, b in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.3)  # ... with about the same result


def test_taps_on_the_root_module_act_in_bfloat16():
    """Accelerate puts a forward on the instance, which would hide the tapped class of a model that is one layer."""
    torch.manual_seed(0)

    def result(gain):
        torch.manual_seed(0)
        layer = nn.Linear(8, 4)
        batches = [(torch.ones(4, 8), torch.tensor([0, 1, 2, 3]))] * 6
        from planish.network import assign, watch

        taps = ActivationNoise(assign(watch(layer, torch.ones(1, 8)), "w4a4"), gain=gain, clip=False)
        tiny.fit(layer, [Spread(taps, gain), taps], batches, run_settings=tiny.settings(mixed_precision="bf16"))
        return layer.weight.detach()

    class Spread(Ingredient):
        def __init__(self, taps, gain):
            self.taps, self.gain = taps, gain

        def after_step(self, run):
            for tap in self.taps.taps.values():
                tap.level.sigma = self.gain

    assert not torch.equal(result(0.0), result(1.0))


def test_precisions_may_follow_each_other():
    for precision in ("no", "bf16", "no"):
        model = tiny.mlp()
        run = tiny.fit(model, run_settings=tiny.settings(epochs=1, mixed_precision=precision))
        assert run.accelerator.mixed_precision == precision


def test_epochs_are_announced_and_change_the_order():
    batches, seen = tiny.loader(), []
    original = batches.dataset.set_epoch
    batches.dataset.set_epoch = lambda epoch: (seen.append(epoch), original(epoch))[1]

    class Look(Ingredient):
        first = []

        def before_step(self, run, inputs, labels):
            if run.step % tiny.STEPS == 0:
                self.first.append(inputs.clone())

    tiny.fit(tiny.mlp(), [Look()], batches, run_settings=tiny.settings(epochs=3))
    assert sorted(set(seen)) == [0, 1, 2]
    assert not torch.equal(Look.first[0], Look.first[1])


def test_no_epochs_leave_the_model_alone():
    model = tiny.conv()
    run = tiny.fit(model, [Averaging(0.9)], run_settings=tiny.settings(epochs=0))
    assert tiny.same(model, tiny.conv())
    assert run.history == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: train(m, [], [TaskLoss()], tiny.settings()), "yields no batch"),
        (lambda m: train(m, iter([]), [TaskLoss()], tiny.settings()), "with a length"),
        (lambda m: train(m, tiny.loader(), [TaskLoss()], tiny.settings(epochs=-1)), "not negative"),
        (lambda m: train(m, tiny.loader(), [], tiny.settings()), "nothing to minimise"),
        (lambda m: train(m, tiny.loader(), [TaskLoss()], tiny.settings(optimizer="lion")), "sgd or adamw"),
        (lambda m: train(m, tiny.loader(), [TaskLoss()], tiny.settings(mixed_precision="fp8")), "bf16"),
        (lambda m: train(m.requires_grad_(False), tiny.loader(), [TaskLoss()], tiny.settings()), "nothing to train"),
        (lambda m: train(m, [torch.randn(4, 1, 8, 8)], [TaskLoss()], tiny.settings()), "needs labels"),
    ],
)
def test_mistakes_get_a_sentence(change, message):
    with pytest.raises(PlanishError, match=message):
        change(tiny.mlp())


def test_taps_come_off_when_something_else_fails():
    class Fails(Ingredient):
        def start(self, run):
            raise RuntimeError("broken")

    model = tiny.conv()
    with pytest.raises(RuntimeError, match="broken"):
        tiny.fit(model, [ActivationNoise(tiny.plan(model)), Fails()])
    assert type(model[0]) is nn.Conv2d
    assert list(model.state_dict()) == list(tiny.conv().state_dict())


def test_frozen_batchnorm_keeps_its_statistics():
    model = tiny.conv()
    tiny.fit(model, run_settings=tiny.settings(freeze_batchnorm=True))
    assert torch.equal(model[1].running_mean, torch.zeros(6))
    assert not torch.equal(model[1].weight, torch.ones(6))


def test_learning_rate_rises_and_falls():
    s = tiny.settings(warmup=0.1, final_lr=0.1)
    rates = [s.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert tiny.settings(warmup=0.0).learning_rate(0, 10, 1.0) == 1.0


def test_seeds_of_steps_differ_and_fit_the_generator():
    seeds = {step_seed(seed, step, rank) & (2**32 - 1) for seed in (0, 1, 2) for step in range(500) for rank in (0, 1)}
    assert len(seeds) == 3000
    torch.manual_seed(step_seed(2**62, 10**9))
