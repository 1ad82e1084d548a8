"""``planish.quantize``: what it touches, what it gives back, what it refuses."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import planish
from planish.errors import PlanishError
from planish.network import taps_of, weights_megabytes
from planish.network.batches import call_model, logits_of
from planish.ptq import METHODS, Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.passes import Calibration, measure, run_passes
from planish.quantizers import UniformQuantizer
from tests.network.zoo import NAMES, build, image
from tests.ptq.reference import round_to_nearest
from tests.training import tiny


@torch.no_grad()
def run(model, example):
    return logits_of(call_model(model, example))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_are_nearly_float_and_the_given_model_is_untouched(name):
    model, example = build(name)
    model.train()
    before, modes = copy.deepcopy(model), [m.training for m in model.modules()]
    quantized = quantize(model, [example], "w8a8")
    assert same_state(model, before)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    expected, ours = run(model.eval(), example), run(quantized, example)
    assert ((ours - expected).norm() / expected.norm()).item() < 0.08
    assert not torch.equal(ours, expected)
    assert not quantized.training
    assert all(tap.fitted for _, tap in taps_of(quantized))


@pytest.mark.parametrize("name", ["vit_gray_28", "test_efficientnet", "hf_vit_sdpa", "twice"])
def test_the_same_twice(name):
    model, example = build(name)
    first, second = (quantize(model, [example, example], "w4a4") for _ in range(2))
    assert same_state(first, second)
    assert torch.equal(run(first, example), run(second, example))


@pytest.mark.parametrize("scheme", ["w4a4", "w2a4", "w8a8", "w3"])
def test_rounding_to_nearest_is_what_the_twin_computes(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    model.eval()
    x, fresh = image(8, batch=4), image(8, batch=3).flip(2)
    torch.testing.assert_close(
        run(quantize(model, [x], scheme), fresh), round_to_nearest(model, x, fresh, scheme), atol=1e-4, rtol=1e-4
    )


def test_weights_only_leaves_activations_in_float():
    model, example = build("vit_gray_28")
    quantized = quantize(model, [example], "w3")
    taps = dict(taps_of(quantized))
    assert taps
    assert all(name.endswith(".weight") for name in taps)
    x = torch.randn(7, 32)
    layer = quantized.blocks[0].mlp.fc1
    weight = taps["blocks.0.mlp.fc1.weight"](layer._parameters["weight"])
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    assert all(len(row.unique()) <= 8 for row in weight)


def test_every_weight_is_on_its_grid_and_the_edges_on_a_finer_one():
    quantized = quantize(build("convolutions")[0], [build("convolutions")[1]], "w2a4")
    for name, tap in taps_of(quantized):
        if name.endswith("weight"):
            module = quantized.get_submodule(name.rpartition(".")[0])
            values = tap(module._parameters["weight"]).movedim(tap.channel_axis, 0).flatten(1)
            most = 256 if name in ("stem.weight", "head.weight") else 4
            assert all(len(row.unique()) <= most for row in values)
            assert tap.scale.numel() == len(values)


@pytest.mark.parametrize("name", ["vit_gray_28", "test_efficientnet", "test_nfnet", "torchvision_vit", "twice"])
def test_a_state_dict_goes_into_another_quantized_model(name):
    model, example = build(name)
    first = quantize(model, [example], "w4a4")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    second = quantize(other, [example], "w4a4")
    assert not torch.equal(run(first, example), run(second, example))
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(first, example), run(second, example))


def test_a_copy_of_a_quantized_model_is_independent():
    model, example = build("torchvision_vit")
    quantized = quantize(model, [example], "w4a4")
    expected = run(quantized, example)
    twin = copy.deepcopy(quantized)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        for _, tap in taps_of(twin):
            tap.scale.mul_(2)
    assert torch.equal(run(quantized, example), expected)
    assert planish.ledger(twin).shares == planish.ledger(quantized).shares


def test_constant_layers_and_dead_channels_make_no_nan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6), nn.ReLU(), nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[3].weight[2].zero_()
        model[3].weight[3].fill_(0.25)
        model[0].bias.fill_(-1)  # the ReLU after it gives zeros only
    for scheme in ("w4a4", "w2a2", "w3"):
        quantized = quantize(model, [image(8)], scheme)
        assert run(quantized, image(8)).isfinite().all()
        for images in (torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), -3.0)):
            assert run(quantize(model, [images], scheme), images).isfinite().all()


def test_values_that_are_not_finite_are_named_by_their_batch_or_site():
    model, example = build("vit_gray_28")
    bad = example.clone()
    bad[1, 0, 3, 3] = float("nan")
    with pytest.raises(PlanishError, match="batch 2 of the calibration loader holds NaN"):
        quantize(model, [example, bad], "w4a4")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 5] = float("inf")
    with pytest.raises(PlanishError, match=r"blocks\.1\.mlp\.(fc1\.weight|fc2\.input): cannot set a range"):
        quantize(model, [example], "w4a4")
    with pytest.raises(PlanishError, match=r"blocks\.1\.mlp\.fc1\.weight: cannot set a range"):
        quantize(model, [example], "w3")


def test_refusals():
    model, example = build("vit_gray_28")
    with pytest.raises(PlanishError, match="no calibration batch"):
        quantize(model, [], "w4a4")
    with pytest.raises(PlanishError, match=f"'banana' is not known: choose one of {', '.join(METHODS)}"):
        quantize(model, [example], "w4a4", "banana")
    for wrong in (Round, "rtn", lambda calibration: None):
        with pytest.raises(PlanishError, match=r"a list of passes holds .*give objects such as Round\(\)"):
            quantize(model, [example], "w4a4", [Calibrate(), wrong])
    with pytest.raises(PlanishError, match="scheme 'w44' is not understood"):
        quantize(model, [example], "w44")
    with pytest.raises(PlanishError, match=r"does not run on an example of shape \(1, 3, 5, 5\)"):
        quantize(model, [torch.zeros(2, 3, 5, 5)], "w4a4")
    with pytest.raises(PlanishError, match="has taps already"):
        quantize(quantize(model, [example], "w4a4"), [example], "w4a4")
    lstm = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 5, batch_first=True))
    with pytest.raises(PlanishError, match="1: aten::"):
        quantize(lstm, [torch.randn(2, 4, 6)], "w4a4")
    assert quantize(lstm, [torch.randn(2, 4, 6)], "w4a4", allow=["1"])[0](torch.randn(2, 6)).shape == (2, 6)


def test_every_pass_leaves_a_line():
    model, example = build("test_efficientnet")
    log = []
    quantize(model, [(example, torch.tensor([0, 1]))], "w4a4", log=log.append)
    assert [record["pass"] for record in log] == ["fold-batchnorm", "calibrate", "round"]
    assert all(record["event"] == "pass" and record["seconds"] >= 0 for record in log)
    assert log[0]["before"] == {"mse": 0.0, "agreement": 1.0}
    assert log[0]["after"]["mse"] < 1e-6  # folding alone changes nothing
    assert log[1]["after"]["mse"] > log[0]["after"]["mse"]
    assert all(first["after"] == second["before"] for first, second in pairwise(log))
    assert log[2]["after"] != log[1]["after"]


class Idle:
    name = "idle"

    def __call__(self, calibration):
        pass


@pytest.mark.parametrize(("sizes", "seen"), [([128, 128], 128), ([64, 64, 64], 128), ([100, 100, 7], 200), ([50], 50)])
def test_the_log_is_measured_on_the_first_images(sizes, seen):
    class Counting(nn.Module):
        images = 0

        def forward(self, x):
            self.images += len(x)
            return x

    model, batches = Counting(), [torch.randn(size, 3) for size in sizes]
    calibration = Calibration(model, batches, None, [*batches[:-1], batches[-1].roll(1, 1)])
    run_passes(calibration, [Idle()])
    assert model.images == seen
    worth, without_last = calibration.log[0]["after"], len(sizes) > 1 and sum(sizes[:-1]) >= 128
    assert (worth["mse"] == 0) == without_last  # only the last batch differs
    model.images = 0
    assert measure(calibration)["mse"] > 0  # passes that decide by it see all images
    assert model.images == sum(sizes)


class Shout:
    name = "shout"

    def __call__(self, calibration):
        assert len(calibration.batches) == len(calibration.reference) == 2
        with torch.no_grad():
            next(p for p in calibration.model.parameters() if p.dim() == 1).add_(1)


def test_a_list_of_passes_is_a_method():
    model, example = build("test_resnet")
    log = []
    ours = quantize(model, [example] * 2, "w4a4", [FoldBatchNorm(), Calibrate(), Round(), Shout()], log=log.append)
    assert [record["pass"] for record in log][-1] == "shout"
    assert not torch.equal(run(ours, example), run(quantize(model, [example] * 2, "w4a4"), example))
    assert torch.equal(run(quantize(model, [example], "w4a4", []), example), run(model, example))
    weights_only = quantize(model, [example], "w4a4", [Round()])
    assert {type(tap) for _, tap in taps_of(weights_only)} == {UniformQuantizer}
    assert all("weight" in name for name, _ in taps_of(weights_only))


def test_calibration_watches_the_float_network_also_after_rounding():
    model, example = build("vit_gray_28")
    first = quantize(model, [example], "w4a4", [Calibrate(), Round()])
    second = quantize(model, [example], "w4a4", [Round(), Calibrate()])
    assert same_state(first, second)
    assert torch.equal(run(first, example), run(second, example))


def test_mappings_and_bare_images_are_batches():
    model, example = build("hf_vit_eager")
    labelled = {**example, "labels": torch.tensor([0, 1])}
    first, second = quantize(model, [example], "w4a4"), quantize(model, [labelled], "w4a4")
    assert torch.equal(run(first, example), run(second, example))


def test_more_bits_leave_less_error():
    model, example = build("test_efficientnet")
    expected = run(model, example)
    errors = [(run(quantize(model, [example], f"w{b}a{b}"), example) - expected).norm().item() for b in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_a_pass_is_logged_as_it_ends():
    class Fails:
        name = "fails"

        def __call__(self, calibration):
            raise PlanishError("no")

    records = []
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(PlanishError, match="no"):
        quantize(model, [torch.randn(5, 4)], "w4a4", [Calibrate(), Fails()], log=records.append)
    assert [record["pass"] for record in records] == ["calibrate"]


@pytest.mark.parametrize(
    ("passes", "shares"),
    [
        ([FoldBatchNorm()], {"float"}),
        ([FoldBatchNorm(), Round()], {"w4", "w8"}),
        ([Calibrate(), Round()], {"w4a4", "w8a8"}),
    ],
)
def test_what_no_pass_rounds_is_in_float_in_the_ledger_and_in_the_file(passes, shares, tmp_path):
    model, log = tiny.conv(), []
    quantized = quantize(model, [torch.randn(8, 1, 8, 8)], "w4a4", passes, log=log.append)
    assert set(planish.ledger(quantized).shares) == shares
    notes = [line["text"] for line in log if line["event"] == "note"]
    whole = shares == {"w4a4", "w8a8"}
    assert [text.startswith("no pass of the list rounds ") for text in notes] == ([] if whole else [True])
    recipe = {"source": "file", "path": str(Path(tiny.__file__)), "function": "conv"}
    planish.save(quantized, tmp_path / "q.safetensors", recipe=recipe)
    back = planish.load(tmp_path / "q.safetensors", trust=True)
    assert planish.ledger(back) == planish.ledger(quantized)
    assert weights_megabytes(back) == weights_megabytes(quantized)


def test_one_tensor_is_no_calibration():
    with pytest.raises(PlanishError, match=r"is one tensor: give batches of images, such as images\.split"):
        quantize(tiny.conv(), torch.randn(8, 1, 8, 8))
