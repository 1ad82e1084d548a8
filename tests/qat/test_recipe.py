"""`planish.train`: from any start to a quantized network, the same loop for every method."""

import copy
from dataclasses import replace

import pytest
import torch

from planish.errors import PlanishError
from planish.flattening import flatten, plain
from planish.network import ledger, reestimate_batchnorm, taps_of
from planish.ptq import Calibrate, Round, quantize
from planish.qat import METHODS, Method, QATSettings, get_method, train_quantized
from planish.qat.methods import KD
from planish.qat.ofq import OFQ
from planish.training import Ingredient, Interrupted, TrainingFailed
from planish.training.engine import make_optimizer
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=1))


@pytest.mark.parametrize("name", ["lsq", "lsq+", "pact", "dorefa", "kd"])
@pytest.mark.parametrize(("make", "size"), [(tiny.conv, 8), (tiny.vit, 16)])
def test_every_baseline_trains_and_leaves_the_given_model_alone(name, make, size):
    model, batches = make(), tiny.loader(size=size)
    model.train()
    trained = train_quantized(model, batches, "w2a4", name, settings=SETTINGS)
    assert tiny.same(model, make())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in trained.modules())
    assert torch.isfinite(trained(torch.randn(2, 1, size, size))).all()
    assert trained.planish_assignment.scheme.name == "w2a4"
    assert "w2a4" in str(ledger(trained))


def test_training_lowers_the_loss_below_that_of_rounding():
    model, batches = tiny.conv(), tiny.loader()

    def loss(m):
        m.eval()
        parts = [torch.nn.functional.cross_entropy(m(x), y) for x, y in batches]
        return torch.stack(parts).mean()

    settings = replace(SETTINGS, training=tiny.settings(epochs=8))
    rounded = quantize(model, [x for x, _ in batches], "w2a2")
    assert loss(train_quantized(model, batches, "w2a2", settings=settings)) < loss(rounded) - 0.05


def distillation_twin(logits, labels, given, temperature, smoothing):
    """Cross-entropy with the labels, some of each spread over all classes, and Hinton's divergence, image by image."""
    total = 0.0
    for row, label, target in zip(logits, labels, given, strict=True):
        hard = torch.full_like(row, smoothing / len(row))
        hard[label] += 1 - smoothing
        p, q = (target / temperature).softmax(-1), (row / temperature).softmax(-1)
        total += -(hard * row.log_softmax(-1)).sum() + temperature**2 * (p * (p / q).log()).sum()
    return total.item() / len(logits)


@pytest.mark.parametrize(
    ("method", "temperature", "smoothing"),
    [(KD(), 1.0, 0.0), (KD(temperature=0.2), 0.2, 0.0), (KD(label_smoothing=0.2), 1.0, 0.2), (OFQ(), 1.0, 0.0)],
    ids=["kd", "temperature", "smoothing", "ofq"],
)
def test_methods_that_distil_learn_from_the_labels_and_from_the_float_network(method, temperature, smoothing):
    given, losses, twins = tiny.conv().eval(), [], []

    class Twin(Ingredient):
        def loss(self, run, inputs, labels, logits):
            twins.append(distillation_twin(logits, labels, given(inputs), temperature, smoothing))

    train_quantized(
        given, tiny.loader(), "w2a2", method, settings=SETTINGS, extra=[Twin()],
        progress=lambda step, steps, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == tiny.STEPS
    assert losses == pytest.approx(twins, rel=1e-5)


def test_from_a_quantized_network_its_grids_are_the_start():
    model, batches = tiny.conv(), tiny.loader()
    rtn = quantize(model, [x for x, _ in batches], "w4a4")
    still = train_quantized(rtn, batches, "w4a4", settings=SETTINGS, epochs=0)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(still(x), rtn(x))
    moved = train_quantized(rtn, batches, "w4a4", "kd", settings=SETTINGS, given=model)
    assert not torch.equal(moved(x), rtn(x))
    with pytest.raises(PlanishError, match=r"quantized already, by w4a4.*would train it by w2a2"):
        train_quantized(rtn, batches, "w2a2", settings=SETTINGS)


def test_from_a_flat_network():
    model, batches = tiny.conv(), tiny.loader()
    flat = flatten(model, batches, "w4a4", settings=plain(tiny.settings(epochs=1)))
    trained = train_quantized(flat, batches, "w4a4", "kd", settings=SETTINGS, given=model)
    assert torch.isfinite(trained(torch.randn(2, 1, 8, 8))).all()


def test_an_average_has_its_own_batchnorm_statistics():
    batches = tiny.loader()
    averaged = train_quantized(tiny.conv(), batches, settings=replace(SETTINGS, averaging=0.9))
    last = train_quantized(tiny.conv(), batches, settings=SETTINGS)
    assert not torch.equal(averaged[1].running_mean, last[1].running_mean)
    assert not torch.equal(averaged[0]._parameters["weight"], last[0]._parameters["weight"])


def test_weight_decay_leaves_step_sizes_alone():
    """A scale for each channel has as many dimensions as its weight."""
    seen = {}

    class Look(Ingredient):
        def start(self, run):
            optimizer, _ = make_optimizer(run.model, run.settings)
            seen["groups"] = [(g["weight_decay"], g.get("share"), len(g["params"])) for g in optimizer.param_groups]

    settings = replace(SETTINGS, training=tiny.settings(epochs=1, weight_decay=0.1, quantizer_lr=0.25))
    train_quantized(tiny.conv(), tiny.loader(), "w4a4", settings=settings, extra=[Look()])
    assert seen["groups"] == [(0.1, None, 3), (0.0, None, 7), (0.0, 0.25, 6)]


@pytest.mark.parametrize("passes", ["rtn", "matched"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_folded_batchnorm_does_not_normalize_a_quantized_network_anew(passes, frozen):
    model, batches = tiny.conv(), tiny.loader(n=64, batch=32)
    images = [x for x, _ in batches]
    for norm in (model[1], model[5]):
        torch.nn.init.constant_(norm.weight, 0.3)
        torch.nn.init.constant_(norm.bias, 1.0)
    reestimate_batchnorm(model.eval(), images)
    start = quantize(model, images, "w8a8", passes)
    still = QATSettings(averaging=None, training=tiny.settings(epochs=1, lr=1e-9, freeze_batchnorm=frozen))
    after, before = train_quantized(start, batches, "w8a8", settings=still)(images[0]), start(images[0])
    assert (after - before).norm() < 0.02 * (before - before.mean(0)).norm()


def test_the_quantizers_share_of_the_learning_rate():
    def scale(share):
        settings = replace(SETTINGS, training=tiny.settings(epochs=1, quantizer_lr=share))
        return dict(taps_of(train_quantized(tiny.conv(), tiny.loader(), "w4a4", settings=settings)))["4.input"].scale

    assert not torch.equal(scale(1.0), scale(0.5))
    start = quantize(tiny.conv(), [x for x, _ in tiny.loader()], "w4a4", [Calibrate(), Round()])
    calibrated = dict(taps_of(start))["4.input"].scale
    assert (scale(0.0) / calibrated - 1).abs() < 0.2  # calibrated on the first batches only


def test_interrupted_and_resumed_it_is_the_same(tmp_path):
    batches = tiny.loader()
    settings = QATSettings(averaging=0.9, training=tiny.settings(epochs=2))
    whole = train_quantized(tiny.conv(), batches, "w4a4", "kd", settings=settings)
    steps = []

    def stop():
        steps.append(1)
        return len(steps) == 8

    with pytest.raises(Interrupted):
        train_quantized(
            tiny.conv(), batches, "w4a4", "kd", settings=settings, checkpoint_dir=tmp_path / "c", should_stop=stop
        )
    resumed = train_quantized(
        tiny.conv(), batches, "w4a4", "kd", settings=settings, checkpoint_dir=tmp_path / "c", resume=True
    )
    assert tiny.same(whole, resumed)


def test_a_loss_that_is_not_finite_keeps_the_last_good_weights():
    class Bad(Ingredient):
        def loss(self, run, inputs, labels, logits):
            return logits.sum() * (float("nan") if run.step == 8 else 0.0)

    with pytest.raises(TrainingFailed, match="step 9") as failure:
        train_quantized(tiny.conv(), tiny.loader(), settings=SETTINGS, epochs=2, extra=[Bad()])
    assert all(torch.isfinite(t).all() for t in failure.value.state_dict.values())


def test_errors():
    with pytest.raises(PlanishError, match="training method 'magic' is not known: choose one of lsq"):
        train_quantized(tiny.conv(), tiny.loader(), method="magic")
    with pytest.raises(PlanishError, match=r"the training method is <class .*KD'>: give the name of one, or an object"):
        train_quantized(tiny.conv(), tiny.loader(), method=KD)
    with pytest.raises(PlanishError, match="kd takes no images without labels: leave unlabelled out, or train by cr"):
        train_quantized(tiny.conv(), tiny.loader(), method="kd", unlabelled=tiny.loader())
    with pytest.raises(PlanishError, match="no batch"):
        train_quantized(tiny.conv(), [], settings=SETTINGS)
    with pytest.raises(PlanishError, match="w9a0"):
        train_quantized(tiny.conv(), tiny.loader(), "w9a0")


def test_methods_say_what_they_are():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.paper
        assert isinstance(get_method(name), Method)
        copy.deepcopy(get_method(name))
