"""ReLU in place of GELU: the fit of an MLP, the guard, files."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import planish
from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.network.rebuilding import rebuilt
from planish.ptq import Calibrate, FoldBatchNorm, Reconstruct, Round, quantize
from planish.ptq import relu as module
from planish.ptq.relu import ReplaceGELU, reconstruct_mlp, relative_error
from planish.ptq.rotate import Rotate
from tests.deploy.tiny import LOOKS, RECIPES
from tests.network.zoo import build
from tests.ptq.test_gptq import wide
from tests.ptq.test_quantize import run, same_state

ROUND = [FoldBatchNorm(), Calibrate(), Round()]
QUICK = ReplaceGELU(iterations=5)


def mlp(seed=0):
    torch.manual_seed(seed)
    first, second, x = nn.Linear(6, 24), nn.Linear(24, 6), torch.randn(600, 6) * 2
    layers = [first.weight, first.bias, second.weight, second.bias]
    return [t.detach() for t in layers], x, second(F.gelu(first(x))).detach()


def test_the_error_is_the_formula():
    (w1, b1, w2, b2), x, y = mlp()
    rest = (x @ w1.T + b1).clamp(min=0) @ w2.T + b2 - y
    expected = rest.square().mean() / y.var(0, unbiased=False).mean()
    assert relative_error([w1, b1, w2, b2], x, y) == pytest.approx(expected.item(), rel=1e-5)


def test_more_steps_come_nearer_also_on_other_rows():
    layers, x, y = mlp()
    fit, rest = slice(0, 450), slice(450, None)
    errors = [relative_error(layers, x[rest], y[rest])]
    for iterations in (1, 200):
        values = reconstruct_mlp(layers, x[fit], y[fit], iterations=iterations, lr=0.02, batch=128)
        errors.append(relative_error(values, x[rest], y[rest]))
    assert errors[1] < 0.6 * errors[0]  # by the ridge
    assert errors[2] < 0.7 * errors[1]
    again = reconstruct_mlp(layers, x[fit], y[fit], iterations=200, lr=0.02, batch=128)
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))


def test_it_begins_with_the_ridge():
    (w1, b1, w2, b2), x, y = mlp()
    values = reconstruct_mlp([w1, b1, w2, b2], x, y, iterations=1, lr=1e-12, batch=64)
    hidden = torch.cat([(x @ w1.T + b1).relu(), torch.ones(len(x), 1)], 1).double()
    best = torch.linalg.lstsq(hidden, y.double()).solution
    ours = hidden @ torch.cat([values[2], values[3][:, None]], 1).double().T
    torch.testing.assert_close(ours, hidden @ best, atol=2e-2, rtol=2e-2)  # but for the penalty
    torch.testing.assert_close(values[0], w1)


def forced(monkeypatch, kept=True):
    """The guard decides as it is told."""
    distances = iter([1.0, 0.5 if kept else 1.0])

    class Told(module.Tuning):
        def distance(self, model, images):
            return next(distances)

    monkeypatch.setattr(module, "Tuning", Told)


def test_a_network_with_relus_is_near_the_given_one(monkeypatch):
    model, images = wide()
    before, lines = copy.deepcopy(model), []
    forced(monkeypatch)
    ours = quantize(model, images.split(16), "w4a4", [ReplaceGELU(iterations=200)], log=lines.append)
    assert same_state(model, before)
    assert [type(block.mlp.act) for block in ours.blocks] == [nn.ReLU] * 2
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.mlp.act = nn.ReLU()
    expected = run(model, images)
    assert (run(ours, images) - expected).norm() < 0.5 * (run(plain, images) - expected).norm()
    notes = [line["text"] for line in lines if line["event"] == "note"]
    assert notes[0].startswith("blocks.0.mlp.act: error of the MLP with ReLU on held-out images")
    assert "the GELU of 2 MLPs is a ReLU now" in notes[-2]
    assert notes[-1].startswith("no pass of the list rounds")


def test_the_ledger_says_so_and_files_load(monkeypatch, tmp_path):
    recipe = RECIPES["vit"]
    torch.manual_seed(0)
    model = timm.create_model(recipe["architecture"], **recipe["arguments"]).eval()
    images = torch.randn(8, 1, 32, 32)
    forced(monkeypatch)
    ours = quantize(model, [images], "w4a4", [QUICK, *ROUND])
    assert planish.ledger(ours).rebuilt == ("relu",)
    assert "the structure is not that of the network as it was given: relu" in str(planish.ledger(ours))
    save(ours, tmp_path / "q.safetensors", recipe=recipe, preprocessing=LOOKS)
    loaded = load(tmp_path / "q.safetensors")
    assert torch.equal(run(loaded, images), run(ours, images))
    assert planish.ledger(loaded).rebuilt == ("relu",)


def test_what_is_no_nearer_is_left_as_it_was(monkeypatch):
    model, images = wide()
    forced(monkeypatch, kept=False)
    lines = []
    ours = quantize(model, [images], "w4a4", [QUICK, *ROUND], log=lines.append)
    assert same_state(ours, quantize(model, [images], "w4a4", ROUND))
    assert rebuilt(ours) == []
    assert any("so every GELU stays" in line.get("text", "") for line in lines)


@pytest.mark.parametrize("more", [[*ROUND], [Rotate(), *ROUND], [*ROUND, Reconstruct(iterations=3)]])
def test_other_passes_come_after_it(monkeypatch, more):
    model, images = wide()
    forced(monkeypatch)
    assert run(quantize(model, images.split(16), "w4a4", [QUICK, *more]), images).isfinite().all()


@pytest.mark.parametrize("name", ["swin", "test_resnet"])
def test_on_other_networks(name):
    model, example = build(name)
    lines = []
    one, two = (quantize(model, [example], "w4a4", [QUICK, *ROUND], log=lines.append) for _ in "ab")
    assert same_state(one, two)
    nothing = any("no GELU between two linear layers" in line.get("text", "") for line in lines)
    assert nothing == (name == "test_resnet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "replace-gelu: iterations is 0: give at least 1"),
        ({"lr": 0.0}, r"replace-gelu: lr is 0\.0: give a number above 0"),
        ({"held": 1.0}, r"held is 1\.0: give a share"),
        ({"memory": -1.0}, r"replace-gelu: memory is -1\.0"),
    ],
)
def test_options_without_a_meaning(options, message):
    with pytest.raises(PlanishError, match=message):
        ReplaceGELU(**options)


def test_a_network_that_is_quantized_already():
    model, images = wide()
    with pytest.raises(PlanishError, match="replace-gelu changes the network in float"):
        quantize(model, [images], "w4a4", [*ROUND, QUICK])
