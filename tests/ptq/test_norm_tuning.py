"""SandwichQuant: norm affines tuned after and before quantization; nothing else moves."""

import copy

import pytest
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.functional import quantize as codes_of
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Round, norm_tuning, quantize
from planish.ptq.affines import norm_parameters
from planish.ptq.norm_tuning import PrepareNorms, TuneNorms
from planish.ptq.outputs import keep_float, layers_of
from planish.ptq.passes import run_logits
from planish.ptq.tuning import Tuning
from tests.deploy.tiny import LOOKS
from tests.ptq.work import NETWORKS, images, network, notes, same, state, work

RTN = (FoldBatchNorm(), Calibrate(), Round())
FAST = {"steps": 12, "batch": 8, "lr": 0.02}


def distance(calibration):
    options = Tuning()
    return options.distance(calibration.model, options.split(calibration)[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_comes_closer_and_the_integers_stay(name):
    model, batches = network(name)
    given = state(model)
    plain = work(model, batches, "w3a3", RTN)
    ours = work(model, batches, "w3a3", [*RTN, TuneNorms(**FAST)])
    assert distance(ours) < distance(plain)
    assert f"{distance(plain):.4g} -> {distance(ours):.4g}" in notes(ours)[0]
    for before, after in zip(layers_of(plain), layers_of(ours), strict=True):
        codes = [codes_of(layer.module._parameters["weight"], layer.tap.grid) for layer in (before, after)]
        assert torch.equal(*codes)
    moved = {n for n, value in state(plain.model).items() if not torch.equal(value, ours.model.state_dict()[n])}
    norms = set(norm_parameters(plain.model))
    if name == "vit":
        assert moved == norms
    else:  # two norms were folded; what was theirs went into scales, weights on the grid and biases
        folded = {layer.path for layer in layers_of(plain)[:-1]}
        assert {n.partition(".")[0] for n in moved} == folded
        assert all(n.split(".", 1)[1] in ("weight", "bias", "planish_taps.weight.scale") for n in moved)
    assert same(state(model), given)
    assert not any(p.requires_grad for p in ours.model.parameters())


def test_the_same_for_a_seed():
    model, batches = network("conv")
    first, second, other = (
        state(work(model, batches, "w3a3", [PrepareNorms(**FAST, seed=seed), *RTN, TuneNorms(**FAST, seed=seed)]).model)
        for seed in (0, 0, 1)
    )
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize("layers", ["folded", "all", "none"])
def test_which_layers_are_scaled(layers):
    model, batches = network("conv")
    plain = work(model, batches, "w3a3", RTN)
    ours = work(model, batches, "w3a3", [*RTN, TuneNorms(**FAST, layers=layers)])
    scaled = [
        a.path
        for a, b in zip(layers_of(ours), layers_of(plain), strict=True)
        if not torch.equal(a.tap.scale, b.tap.scale)
    ]
    assert scaled == {"folded": ["0", "4"], "all": ["0", "4", "9"], "none": []}[layers]
    if layers == "none":
        assert notes(ours) == ["the network has no norm whose affine parameters could be tuned"]
        assert same(state(ours.model), state(plain.model))


def test_norms_that_are_not_folded_are_tuned_themselves():
    model, batches = network("conv")
    ours = work(model, batches, "w3a3", [Calibrate(), Round(), TuneNorms(**FAST)])
    plain = work(model, batches, "w3a3", [Calibrate(), Round()])
    moved = {n for n, value in state(plain.model).items() if not torch.equal(value, ours.model.state_dict()[n])}
    assert moved == {"1.weight", "1.bias", "5.weight", "5.bias"}


@pytest.mark.parametrize("name", ["conv", "vit"])
@pytest.mark.parametrize("step", [TuneNorms, PrepareNorms])
def test_everything_is_put_back_if_it_does_not_help(name, step, monkeypatch):
    model, batches = network(name)
    steps = [*RTN, step(**FAST)] if step is TuneNorms else [step(**FAST), *RTN]
    count = iter(range(1000))
    monkeypatch.setattr(Tuning, "distance", lambda *_: float(next(count)))
    ours = work(model, batches, "w3a3", steps)
    assert same(state(ours.model), state(work(model, batches, "w3a3", RTN).model))
    assert "that is not lower, so everything was put back" in notes(ours)[0]


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_affines_that_suit_the_rounded_copy_only_are_not_kept(name, monkeypatch):
    model, batches = network(name)
    distances = iter([1.0, *(0.5 / i for i in range(1, 11)), 2.0])  # before, ten checks, and rounded from scratch
    monkeypatch.setattr(Tuning, "distance", lambda *_: next(distances))
    prepared = work(model, batches, "w3a3", [PrepareNorms(**FAST)])
    assert same(state(prepared.model), state(model))
    assert "1 -> 2; that is not lower" in notes(prepared)[0]


def test_steps_that_lead_away_are_not_kept():
    model, batches = network("vit")
    ours = work(model, batches, "w8a8", [*RTN, TuneNorms(steps=10, lr=50.0)])
    assert same(state(ours.model), state(work(model, batches, "w8a8", RTN).model))


def test_other_images_and_batches_with_labels():
    model, batches = network("vit")
    loader = [(images(8, 16, seed=5), torch.zeros(8))] * 2
    ours = work(model, batches, "w3a3", [*RTN, TuneNorms(**FAST, images=loader)])
    assert distance(ours) < distance(work(model, batches, "w3a3", RTN))
    labelled = quantize(
        model, [(b, torch.zeros(len(b))) for b in batches], "w3a3", [*RTN, TuneNorms(**FAST, images=loader)]
    )
    assert same(state(labelled), state(ours.model))


@pytest.mark.parametrize("name", NETWORKS)
def test_only_affines_are_prepared(name):
    model, batches = network(name)
    prepared = work(model, batches, "w3a3", [PrepareNorms(**FAST)])
    moved = {n for n, value in state(model).items() if not torch.equal(value, prepared.model.state_dict()[n])}
    assert moved
    assert moved <= set(norm_parameters(model))
    assert not any(True for _ in taps_of(prepared.model))
    for step in RTN:
        step(prepared)
    assert distance(prepared) < distance(work(model, batches, "w3a3", RTN))


def test_the_affine_of_a_batchnorm_is_its_layers_factor_and_shift():
    model, batches = network("conv")
    with torch.no_grad():
        for norm in (model[1], model[5]):
            norm.bias.normal_(0, 2)
    calibration = work(model, batches, "w8")
    trial, pairs = norm_tuning.rounded_copy(calibration)
    affines = norm_tuning.Affines({}, [layer for layer in layers_of(trial) if layer.path in pairs])
    with torch.no_grad():
        for parameter in affines.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        norm_tuning._copy_affines(calibration.model, affines, pairs)
        with affines.applied():
            torch.testing.assert_close(calibration.model(batches[0]), trial.model(batches[0]), atol=0.03, rtol=0.03)
        assert (calibration.model(batches[0]) - model(batches[0])).abs().max() > 0.1


@pytest.mark.parametrize("step", [TuneNorms(**FAST), PrepareNorms(**FAST)])
def test_nothing_to_do(step):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)), images()
    steps = [*RTN, step] if isinstance(step, TuneNorms) else [step, *RTN]
    ours = work(model, [x], "w3a3", steps)
    assert same(state(ours.model), state(work(model, [x], "w3a3", RTN).model))
    assert notes(ours) == ["the network has no norm whose affine parameters could be tuned"]


def test_refusals():
    with pytest.raises(PlanishError, match="layers is 'some'"):
        TuneNorms(layers="some")
    with pytest.raises(PlanishError, match="steps is 0"):
        PrepareNorms(steps=0)
    model, batches = network("conv")
    with pytest.raises(PlanishError, match="put it first"):
        work(model, batches, passes=[Calibrate(), PrepareNorms(**FAST)])


def test_saved_and_loaded(tmp_path):
    import timm

    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1,
                 "num_classes": 4}  # fmt: skip
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    x = images(8, 16)
    steps = [PrepareNorms(**FAST), *RTN, TuneNorms(**FAST, layers="all")]
    quantized = quantize(copy.deepcopy(model), [x], "w3a3", steps)
    looks = type(LOOKS)((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
    recipe = {"source": "timm", "architecture": "vit_tiny_patch16_224", "arguments": arguments}
    save(quantized, tmp_path / "q.safetensors", recipe=recipe, preprocessing=looks, protocol={})
    loaded = load(tmp_path / "q.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), quantized(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_passes_behind_it_compare_with_the_float_network(name):
    model, batches = network(name)
    tuned = work(model, batches, "w3a3", [*RTN, TuneNorms(**FAST)])
    assert not same(state(tuned.model), state(work(model, batches, "w3a3", RTN).model))  # it does change something
    torch.testing.assert_close(run_logits(keep_float(tuned), batches), tuned.reference)
