"""Distillation from the float network: its loss, its images, its steps."""

from itertools import islice

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.ptq.affines import Affines, norm_parameters
from planish.ptq.tuning import Images, Tuning, divergence
from tests.ptq.work import images, network, same, state, work


def test_divergence_is_the_formula():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.randn(5, 3)
    p, q = (target / 4).softmax(-1), (logits / 4).softmax(-1)
    expected = 16 * sum(p[i, k] * (p[i, k] / q[i, k]).log() for i in range(5) for k in range(3)) / 5
    torch.testing.assert_close(divergence(logits, target, 4.0), expected)
    assert divergence(target, target, 4.0) == 0


def test_every_epoch_takes_each_image_once():
    pool = Images({"x": torch.arange(10.0)}, torch.arange(10.0))
    batches = list(islice(pool.shuffled(4, torch.Generator().manual_seed(0)), 4))
    assert [len(batch) for batch in batches] == [4] * 4
    assert all(torch.equal(batch.inputs["x"], batch.targets) for batch in batches)
    assert len({float(v) for batch in batches[:2] for v in batch.targets}) == 8
    assert not torch.equal(batches[0].targets, batches[2].targets)
    assert len(next(pool.shuffled(64, torch.Generator()))) == 10


def test_a_tenth_is_held_out():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    calibration = work(model, [images(15), images(15, seed=1)])
    batches, held = Tuning(batch=27).split(calibration)
    fit = next(batches)
    assert (len(fit), len(held)) == (27, 3)
    everything = torch.cat([fit.inputs, held.inputs]).flatten(1)
    assert {tuple(row.tolist()) for row in everything} == {
        tuple(row.tolist()) for row in torch.cat(calibration.batches).flatten(1)
    }
    torch.testing.assert_close(held.targets, model(held.inputs).detach())
    assert len(Tuning().split(work(model, [images(1)]))[1]) == 1


def test_other_images_leave_all_calibration_images_to_judge():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout()).train()
    calibration = work(model, [images(6)])
    model.train()
    given = [(images(4, seed=2), torch.zeros(4)), (images(2, seed=3), torch.zeros(2))]
    batches, held = Tuning(images=given).split(calibration)
    assert len(held) == 6
    drawn = list(islice(batches, 5))
    assert [len(batch) for batch in drawn] == [4, 2, 4, 2, 4]
    assert torch.equal(drawn[2].targets, model.eval()(given[0][0]).detach())
    with pytest.raises(PlanishError, match="images gave no batch"):
        list(islice(Tuning(images=iter(given)).split(calibration)[0], 3))
    calibration.given = None
    with pytest.raises(PlanishError, match="images need the float network"):
        next(Tuning(images=given).split(calibration)[0])


def test_the_distance_weighs_images_equally():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    pool = Images(images(70), torch.randn(70, 3))
    with torch.no_grad():
        expected = divergence(model(pool.inputs), pool.targets, 2.0)
    assert Tuning(batch=3, temperature=2.0).distance(model, pool) == pytest.approx(expected.item(), rel=1e-5)


def test_the_affines_of_another_network_are_found_again():
    model, batches = network("vit")
    calibration = work(model, batches)
    with torch.no_grad():
        for parameter in norm_parameters(calibration.model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    options = Tuning(steps=40, lr=0.03, batch=8)
    affines = Affines(norm_parameters(calibration.model))
    frozen = {n: v for n, v in state(calibration.model).items() if "norm" not in n}
    before, after = options.tune(calibration.model, affines, *options.split(calibration))
    assert after < 0.3 * before
    assert options.distance(calibration.model, options.split(calibration)[1]) == pytest.approx(after)
    assert same({n: v for n, v in state(calibration.model).items() if "norm" not in n}, frozen)
    assert all(parameter.grad is None for parameter in calibration.model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [({"steps": 0}, "steps is 0"), ({"batch": 0}, "batch is 0"), ({"lr": 0.0}, r"lr is 0\.0"),
     ({"temperature": float("nan")}, "temperature is nan"), ({"clip": -1.0}, "clip is -1"),
     ({"held": 0.0}, "held is 0")],
)  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(PlanishError, match=match):
        Tuning(**options)
