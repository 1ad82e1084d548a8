"""GPLQ's first stage: components against numpy's, the loss against equation 2, weights in float until the end."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from planish.errors import PlanishError
from planish.network import assign, ledger, taps_of, watch
from planish.ptq import Calibrate, Round, quantize
from planish.qat import QATSettings, train_quantized
from planish.qat.gplq import GPLQ, FeatureMimicry, mimicry, penultimate, principal_components
from planish.quantizers import UniformQuantizer, fit_grid
from planish.training import Ingredient, Interrupted
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=2))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_components_are_those_of_numpy():
    features = draw(200, 12) @ torch.diag(torch.linspace(0.1, 2, 12)) @ torch.linalg.qr(draw(12, 12, seed=1))[0] + 3
    mean, components = principal_components(features, 0.6)
    values, vectors = np.linalg.eigh(np.cov(features.numpy().T))
    explained = np.cumsum(values[::-1]) / values.sum()
    count = int(np.argmax(explained >= 0.6)) + 1
    assert components.shape == (12, count)
    assert 1 < count < 12
    torch.testing.assert_close(mean, features.mean(0))
    theirs = vectors[:, ::-1][:, :count]
    np.testing.assert_allclose(components @ components.T, theirs @ theirs.T, atol=1e-5)  # signs are arbitrary
    assert principal_components(features, 1.0)[1].shape[1] == 12
    assert principal_components(torch.ones(5, 3), 0.6)[1].isfinite().all()


def mimicry_twin(student, teacher, mean, components):
    """Equation 2, image by image."""
    total = 0.0
    for f_s, f_t in zip(student, teacher, strict=True):
        for v in components.T:
            total += (torch.dot(f_s - mean, v) - torch.dot(f_t - mean, v)) ** 2
    return total / len(student)


def test_the_loss_is_that_of_equation_2():
    student, teacher, mean = draw(5, 6), draw(5, 6, seed=1), draw(6, seed=2)
    components = torch.linalg.qr(draw(6, 3, seed=3))[0]
    ours = mimicry(student, teacher, mean, components)
    torch.testing.assert_close(ours, mimicry_twin(student, teacher, mean, components))
    # what is outside the components does not count
    outside = torch.eye(6) - components @ components.T
    torch.testing.assert_close(mimicry(student + 7 * draw(5, 6) @ outside, teacher, mean, components), ours)


class Forward(Ingredient):
    """Whether the weights that are multiplied with are the parameters themselves."""

    def before_step(self, run, inputs, labels):
        self.kinds = {type(tap).__name__ for name, tap in taps_of(run.model) if name.endswith("weight")}


@pytest.mark.parametrize(("make", "size"), [(tiny.conv, 8), (tiny.vit, 16)])
def test_weights_are_rounded_only_at_the_end(make, size):
    look = Forward()
    trained = train_quantized(make(), tiny.loader(size=size), "w4a4", "gplq", settings=SETTINGS, extra=[look])
    assert look.kinds == {"LaterQuantizer"}  # the first and the last layer, too
    for name, tap in taps_of(trained):
        assert type(tap) is UniformQuantizer
        owner, _, slot = name.rpartition(".")
        weight = trained.get_submodule(owner)._parameters.get(slot)
        if weight is not None:
            axis = tap.channel_axis
            assert torch.equal(tap.grid.scale, fit_grid(weight, tap.format, channel_axis=axis).scale)
    assert all(row.bits for row in ledger(trained).rows)


def test_without_training_it_is_calibrated_rounding():
    batches = tiny.loader()
    still = train_quantized(tiny.conv(), batches, "w4a4", "gplq", calibration=batches, settings=SETTINGS, epochs=0)
    rounded = quantize(tiny.conv(), [x for x, _ in batches], "w4a4", [Calibrate(), Round()])
    assert torch.equal(still(draw(3, 1, 8, 8)), rounded(draw(3, 1, 8, 8)))


def test_mimicry_keeps_the_features():
    """Along the components, they stay nearer to the teacher's than with the labels alone."""
    teacher, batches = tiny.vit().eval(), tiny.loader(size=16)
    images = torch.cat([x for x, _ in batches])

    def features(model):
        with torch.no_grad():
            return model.forward_head(model.forward_features(images), pre_logits=True)

    mean, components = principal_components(features(teacher), 0.6)

    def distance(method):
        trained = train_quantized(tiny.vit(), batches, "w8a8", method, settings=SETTINGS, epochs=4)
        return mimicry(features(trained), features(teacher), mean, components)

    assert distance(GPLQ(mimic=10.0)) < 0.5 * distance(GPLQ(mimic=0.0))


def test_a_run_minimises_what_its_options_say():
    teacher, batches, losses, twins, entering = tiny.conv().eval(), tiny.loader(), [], [], []
    features = teacher[:9]  # all but the last layer
    known = features(torch.cat([x for x, _ in batches])).detach()
    mean, components = principal_components(known, 0.95)
    assert components.shape[1] > principal_components(known, 0.6)[1].shape[1]  # those of the default

    class Twin(Ingredient):
        def start(self, run):
            run.model[9].register_forward_pre_hook(lambda module, args: entering.append(args[0].detach()))

        def loss(self, run, inputs, labels, logits):
            twins.append(3.0 * mimicry_twin(entering[-1], features(inputs), mean, components).item())

    train_quantized(
        teacher, batches, "w4a4", GPLQ(task=0.0, mimic=3.0, variance=0.95), settings=SETTINGS, extra=[Twin()],
        progress=lambda step, steps, loss: losses.append(loss),
    )  # fmt: skip
    assert min(twins) > 0
    assert losses == pytest.approx(twins, rel=1e-4)


def test_where_the_features_are():
    for make, size, path in [(tiny.conv, 8, "9"), (tiny.vit, 16, "head"), (tiny.mlp, 8, "3")]:
        plan = assign(watch(make(), draw(1, 1, size, size)), "w4a4")
        assert penultimate(plan.products) == path
    with pytest.raises(PlanishError, match="no linear layer"):
        penultimate([])


def test_the_same_images_whatever_was_drawn_before():
    class Draw(Ingredient):
        def start(self, run):
            torch.manual_seed(self.seed)

    def components(seed):
        draw, mimic = Draw(), FeatureMimicry(tiny.conv(), "9", images=8)
        draw.seed, batches = seed, DataLoader(tiny.data(), 4, shuffle=True)
        tiny.fit(tiny.conv(), [draw, mimic], batches, run_settings=tiny.settings(epochs=1))
        return mimic.components

    assert torch.equal(components(1), components(2))


def test_interrupted_and_resumed_it_is_the_same(tmp_path):
    def fit(**options):
        return train_quantized(tiny.conv(), tiny.loader(), "w4a4", "gplq", settings=SETTINGS, **options)

    steps = []
    with pytest.raises(Interrupted):
        fit(checkpoint_dir=tmp_path / "c", should_stop=lambda: steps.append(1) or len(steps) == 8)
    assert tiny.same(fit(), fit(checkpoint_dir=tmp_path / "c", resume=True))


def test_errors():
    with pytest.raises(PlanishError, match="share in"):
        FeatureMimicry(nn.Linear(2, 2), "", variance=0.0)
    with pytest.raises(PlanishError, match=r"mimic=-1\.0: it is positive, or 0"):
        FeatureMimicry(nn.Linear(2, 2), "", weight=-1.0)
