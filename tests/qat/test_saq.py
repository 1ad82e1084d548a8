"""SAQ against two passes written out with autograd, and what it promises of a step."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from planish.errors import PlanishError
from planish.network import taps_of
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.saq import SAQ, QuantizedSAM, ascent
from planish.training import Ingredient, Interrupted
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=2, clip_norm=None))


def saq_twin(model, inputs, labels, rho):
    """The loss at Q(w) and the gradients at Q(w) + eps; the rounded weights are caught, and moved, at their taps."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def run(shifts):
        leaves = {name: state[name].clone().requires_grad_() for name, _ in model.named_parameters()}
        buffers = {name: state[name].clone() for name, _ in model.named_buffers()}
        rounded, handles = {}, []
        for name, tap in taps_of(model):
            if name.endswith("weight"):

                def hook(tap, args, out, name=name):
                    rounded[name] = out
                    return out + shifts.get(name, 0.0)

                handles.append(tap.register_forward_hook(hook))
        loss = F.cross_entropy(functional_call(model, {**leaves, **buffers}, (inputs,)), labels)
        for handle in handles:
            handle.remove()
        return loss, leaves, rounded

    loss, _, rounded = run({})
    gradients = torch.autograd.grad(loss, list(rounded.values()))
    norm = sum((g**2).sum() for g in gradients).sqrt()
    worst, leaves, _ = run({name: rho * g / norm for name, g in zip(rounded, gradients, strict=True)})
    return loss, dict(zip(leaves, torch.autograd.grad(worst, list(leaves.values())), strict=True))


class Compare(Ingredient):
    """The twin's gradients beside those of the first step, with a SAQ that acts inside of it."""

    def __init__(self, rho, every=1):
        self.options = rho, every

    def start(self, run):
        taps = {name: tap for name, tap in taps_of(run.model) if name.endswith("weight")}
        self.saq = QuantizedSAM(taps, *self.options)
        self.saq.start(run)

    def before_step(self, run, inputs, labels):
        if run.step == 0:
            self.expected = saq_twin(run.model, inputs, labels, self.options[0])
            self.plain = saq_twin(run.model, inputs, labels, 1e-9)[1]

    def around(self, run, compute):
        loss = self.saq.around(run, compute)
        if run.step == 0:
            self.loss_value = loss
            self.gradients = {name: p.grad.clone() for name, p in run.model.named_parameters()}
        return loss

    def finish(self, run):
        self.saq.finish(run)


@pytest.mark.parametrize(("make", "size"), [(tiny.conv, 8), (tiny.vit, 16)])
def test_gradients_are_those_of_the_twin(make, size):
    compare = Compare(0.5)
    train_quantized(make(), tiny.loader(size=size), "w2a2", settings=SETTINGS, epochs=1, extra=[compare])
    loss, gradients = compare.expected
    torch.testing.assert_close(compare.loss_value, loss)  # what is shown is the loss at Q(w)
    assert set(gradients) == set(compare.gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compare.gradients[name], gradient, rtol=1e-3, atol=1e-6)
    assert any(not torch.allclose(gradients[name], compare.plain[name], rtol=0.05) for name in gradients)


def test_eps_is_rho_long_and_uphill():
    gradients = {"a": torch.randn(3, 4), "b": 5 * torch.randn(7)}
    eps = ascent(gradients, 0.3)
    assert torch.cat([e.flatten() for e in eps.values()]).norm() == pytest.approx(0.3)
    ratio = torch.cat([(eps[name] / g).flatten() for name, g in gradients.items()])
    torch.testing.assert_close(ratio, ratio[:1].expand(19))
    assert ratio[0] > 0
    assert all((e == 0).all() for e in ascent({"a": torch.zeros(3)}, 0.3).values())


def test_a_vanishing_radius_is_lsq():
    plain = train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=SETTINGS)
    near = train_quantized(tiny.conv(), tiny.loader(), "w2a2", SAQ(rho=1e-12), settings=SETTINGS)
    assert not tiny.same(plain, train_quantized(tiny.conv(), tiny.loader(), "w2a2", SAQ(rho=0.3), settings=SETTINGS))
    for name, value in near.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


class Count(Ingredient):
    def __init__(self):
        self.passes = []

    def before_step(self, run, inputs, labels):
        self.passes.append(0)

    def loss(self, run, inputs, labels, logits):
        self.passes[-1] += 1


def test_plain_steps_between():
    count = Count()
    train_quantized(tiny.conv(), tiny.loader(), "w2a2", SAQ(every=3), settings=SETTINGS, epochs=1, extra=[count])
    assert count.passes == [2, 1, 1, 2, 1, 1]


def test_batchnorm_keeps_the_statistics_of_the_first_pass():
    class Statistics(Ingredient):
        def loss(self, run, inputs, labels, logits):
            if run.step == 0:
                self.after.append(run.model[1].running_mean.clone())

    look = Statistics()
    look.after = []
    train_quantized(tiny.conv(), tiny.loader(), "w2a2", SAQ(rho=1.0), settings=SETTINGS, epochs=1, extra=[look])
    assert len(look.after) == 2
    assert torch.equal(*look.after)


def test_nothing_stays_behind(tmp_path):
    class Look(Ingredient):
        def finish(self, run):
            self.hooks = [len(tap._forward_hooks) for _, tap in taps_of(run.model)]

    look = Look()
    whole = train_quantized(tiny.conv(), tiny.loader(), "w2a2", "saq", settings=SETTINGS, extra=[look])
    assert sum(look.hooks) == 0
    steps = []
    with pytest.raises(Interrupted):
        train_quantized(
            tiny.conv(), tiny.loader(), "w2a2", "saq", settings=SETTINGS, checkpoint_dir=tmp_path / "c",
            should_stop=lambda: steps.append(1) or len(steps) == 8,
        )  # fmt: skip
    resumed = train_quantized(
        tiny.conv(), tiny.loader(), "w2a2", "saq", settings=SETTINGS, checkpoint_dir=tmp_path / "c", resume=True
    )
    assert tiny.same(whole, resumed)


def test_errors():
    assert isinstance(SAQ(), Method)
    with pytest.raises(PlanishError, match="rho of SAQ"):
        QuantizedSAM({}, rho=0.0)
    with pytest.raises(PlanishError, match="rho of SAQ"):
        QuantizedSAM({}, every=0)
