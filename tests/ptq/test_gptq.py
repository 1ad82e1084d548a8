"""GPTQ against two readable twins, and what it promises."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.gptq import GPTQ, gptq_round
from planish.ptq.ridge import RidgeCorrection
from planish.quantizers import fit_grid
from planish.scheme import Format, Scheme
from tests.deploy.tiny import LOOKS, RECIPES
from tests.network.zoo import build
from tests.ptq.test_quantize import run, same_state

DAMP = 0.01
PREPARE = [FoldBatchNorm(), Calibrate()]
VARIED = ["convolutions", "einsum", "twice", "encoder", "gpt2", "hf_vit_eager", "swin", "vit_gray_28", "test_nfnet"]


def brute_force(weight, hessian, grid, act_order=True, damp=DAMP):
    """One (R, K) weight: round a column, solve for the best change of those left by an explicit inverse, repeat."""
    w, k = weight.double().clone(), weight.shape[1]
    mean = hessian.diagonal()[hessian.diagonal() > 0].mean()
    hessian = hessian + damp * mean * torch.eye(k, dtype=torch.float64)
    scale, zero = (x.expand(weight.shape) for x in (grid.scale, grid.zero_point))
    left = list(range(k))
    if act_order:
        left.sort(key=lambda i: -hessian[i, i].item())
    while left:
        i = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = grid._replace(scale=scale[:, i], zero_point=zero[:, i])
        error = w[:, i] - fake_quantize(w[:, i], column)
        w[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left.pop(0)
    return fake_quantize(w, grid)


def babai(weight, hessian, grid, damp=DAMP):
    """The nearest-plane algorithm on the lattice of a Cholesky factor of H itself, its last dimension first."""
    k = weight.shape[1]
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    r = torch.linalg.cholesky(hessian.flip(0, 1), upper=True)
    target, q = weight.double().flip(1), torch.zeros_like(weight, dtype=torch.float64)
    for i in reversed(range(k)):
        centre = target[:, i] - ((q - target)[:, i + 1 :] @ r[i, i + 1 :]) / r[i, i]
        q[:, i] = fake_quantize(centre[:, None], grid)[:, 0]
    return q.flip(1)


def layer(r=6, k=12, samples=40, seed=0):
    """A weight and correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) + 1
    x = mix @ torch.randn(k, samples, generator=generator, dtype=torch.float64)
    return torch.randn(r, k, generator=generator), x


FORMATS = {
    **{f"{b} bits": Format(b, "channel", half_integer=b == 2) for b in range(2, 9)},
    "affine": Format(3, "channel", symmetric=False),
    "tensor": Format(3),
    "group": Format(3, "group", group_size=4),
}


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_brute_force_solution(name, act_order):
    weight, x = layer()
    grid = fit_grid(weight, FORMATS[name])
    ours = gptq_round(weight[None], 2 * (x @ x.T)[None], grid, act_order=act_order, block=5)[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, brute_force(weight, 2 * x @ x.T, grid, act_order).float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(fake_quantize(ours, grid), ours)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_nearest_plane_algorithm(bits):
    weight, x = layer(seed=1)
    grid = fit_grid(weight, Format(bits, "channel", half_integer=bits == 2))
    ours = gptq_round(weight[None], (x @ x.T)[None], grid, act_order=False)[0]
    torch.testing.assert_close(ours.double(), babai(weight, x @ x.T, grid), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_the_output_is_nearer_than_with_rounding_to_nearest(name):
    for seed in range(3):
        weight, x = layer(r=16, k=24, samples=200, seed=seed)
        grid = fit_grid(weight, FORMATS[name])
        ours = gptq_round(weight[None], (x @ x.T)[None], grid)[0]
        nearest = fake_quantize(weight, grid)
        assert ((weight - ours).double() @ x).norm() < 0.9 * ((weight - nearest).double() @ x).norm()


def test_inputs_without_correlation_give_rounding_to_nearest():
    weight, _ = layer()
    grid = fit_grid(weight, Format(3, "channel"))
    for hessian in (torch.eye(12), torch.rand(12).add(0.1).diag(), torch.zeros(12, 12)):
        assert torch.equal(gptq_round(weight[None], hessian[None], grid)[0], fake_quantize(weight, grid))


def test_groups_are_rounded_each_by_its_own_inputs():
    (one, x), (two, y) = layer(seed=2), layer(seed=3)
    weight, hessian = torch.stack([one, two]), torch.stack([x @ x.T, y @ y.T])
    grid = fit_grid(weight, Format(3))
    both = gptq_round(weight, hessian, grid)
    for i in range(2):
        assert torch.equal(both[i], gptq_round(weight[i : i + 1], hessian[i : i + 1], grid)[0])


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody(act_order):
    weight, x = layer()
    alive, dead = [2, 5, 9], [0, 1, 3, 4, 6, 7, 8, 10, 11]
    x[dead] = 0
    grid = fit_grid(weight, Format(6, "channel"))
    ours = gptq_round(weight[None], (x @ x.T)[None], grid, damp=0.5, act_order=act_order)[0]
    assert torch.equal(ours[:, dead], fake_quantize(weight, grid)[:, dead])
    rest = gptq_round(weight[None, :, alive], (x[alive] @ x[alive].T)[None], grid, damp=0.5, act_order=act_order)[0]
    assert torch.equal(ours[:, alive], rest)


def test_fewer_images_than_inputs_and_almost_no_damping():
    weight, x = layer(samples=3)
    x *= 1e4
    grid = fit_grid(weight, Format(4, "channel"))
    for damp in (1e-30, 1e-2):
        ours = gptq_round(weight[None], (x @ x.T)[None], grid, damp=damp)[0]
        assert torch.equal(fake_quantize(ours, grid), ours)
        assert ((weight - ours).double() @ x).norm() < ((weight - fake_quantize(weight, grid)).double() @ x).norm()


def test_the_size_of_a_block_changes_nothing():
    weight, x = layer(k=30)
    grid = fit_grid(weight, Format(4, "channel"))
    results = [gptq_round(weight[None], (x @ x.T)[None], grid, block=block) for block in (1, 7, 30, 128)]
    assert all(torch.equal(result, results[0]) for result in results)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4, 12), nn.ReLU(), nn.Linear(12, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@torch.no_grad()
def test_the_pass_on_a_chain_is_what_a_loop_over_its_layers_gives(inputs):
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = chain()
    reference = quantize(model, [images], "w3a4", [*PREPARE, Round()])
    log = []
    ours = quantize(model, images.split(9), "w3a4", [*PREPARE, GPTQ(inputs=inputs)], log=log.append)
    assert log[-1]["pass"] == "gptq"
    taps = dict(taps_of(reference))
    quantized, exact = images, images
    for i, module in enumerate(reference):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            latent, weight, grid = module._parameters["weight"], module._parameters["weight"], taps[f"{i}.weight"].grid
            shown = taps[f"{i}.input"](quantized) if inputs == "quantized" else exact
            exact = nn.Module.__call__(chain_layer(module, weight), exact)
            groups = getattr(module, "groups", 1)
            rows = columns_of(module, shown)
            per = len(weight) // groups
            parts = [
                brute_force(
                    weight[g * per : (g + 1) * per].flatten(1), 2 * rows[g].double() @ rows[g].double().T,
                    Grid(grid.scale[g * per : (g + 1) * per].flatten(1), torch.zeros(()), *grid[2:]),
                ).float()
                for g in range(groups)
            ]  # fmt: skip
            latent.copy_(torch.cat(parts).reshape(weight.shape))
            torch.testing.assert_close(ours[i]._parameters["weight"], latent, atol=1e-5, rtol=1e-5)
            quantized = module(quantized)
        else:
            quantized, exact = module(quantized), module(exact)
    torch.testing.assert_close(run(ours, images), quantized, atol=1e-4, rtol=1e-4)


def chain_layer(module, weight):
    """The layer without taps."""
    plain = copy.deepcopy(module)
    plain.__class__ = type(module)._planish_class
    plain._modules.clear()
    plain._parameters["weight"] = nn.Parameter(weight.clone())
    return plain


def columns_of(module, x):
    if isinstance(module, nn.Linear):
        return [x.T]
    unfolded = nn.functional.unfold(x, module.kernel_size, stride=module.stride)  # (N, C * places, L)
    return unfolded.transpose(0, 1).flatten(1).chunk(module.groups)


@pytest.mark.parametrize("name", VARIED)
def test_on_many_networks_the_weights_lie_on_the_grids_of_rounding(name):
    model, example = build(name)
    records = []
    nearest = quantize(model, [example], "w4a4")
    ours = quantize(model, [example], "w4a4", [*PREPARE, GPTQ(), Keep(records)])
    taps, theirs = dict(taps_of(ours)), dict(taps_of(nearest))
    notes = " ".join(record["text"] for record in records if record["event"] == "note")
    moved = 0
    for site, _ in ours.planish_assignment.quantized():
        tap = taps[site.name]
        assert torch.equal(tap.scale, theirs[site.name].scale)
        if site.is_weight and site.parameter:
            latent = ours.get_submodule(site.owner)._parameters[site.slot]
            moved += int(torch.equal(tap(latent), latent))
    weights = [site for site, _ in ours.planish_assignment.quantized() if site.is_weight]
    assert moved < len(weights) or not notes
    assert (f"{len(weights) - moved} of {len(weights)} weights are rounded to nearest" in notes) == bool(notes)
    assert not same_state(ours, nearest)
    assert run(ours, example).isfinite().all()


class Keep:
    """A pass that keeps the log."""

    name = "keep"

    def __init__(self, records):
        self.records = records

    def __call__(self, calibration):
        self.records += calibration.log


def test_what_cannot_be_done_is_said():
    model, example = build("convolutions")
    records = []
    quantize(model, [example], "w4a4", [*PREPARE, GPTQ(), Keep(records)])
    (note,) = (record for record in records if record["event"] == "note")
    assert note["pass"] == "gptq"
    assert note["text"] == "2 of 7 weights are rounded to nearest instead: up.weight, up_line.weight"


@pytest.mark.parametrize("scheme", ["w3a8", "w3", "w2a4"])
def test_less_error_at_the_logits_than_rounding_to_nearest(scheme):
    model, images = wide()
    expected = run(model, images)
    errors = [
        (run(quantize(model, images.split(32), scheme, [*PREPARE, step]), images) - expected).norm()
        for step in (Round(), GPTQ(), GPTQ(inputs="float"))
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[0]


def wide():
    """A network of correlated activations."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, in_chans=1, num_classes=4
    ).eval()
    images = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return model, nn.functional.interpolate(images, scale_factor=4, mode="bicubic")


def test_the_same_twice_and_in_batches_of_any_size():
    model, images = wide()
    one, two, other = (quantize(model, images.split(n), "w3a4", [*PREPARE, GPTQ()]) for n in (32, 32, 64))
    assert same_state(one, two)
    weights = [p for p in other.parameters() if p.dim() == 2]
    same = [
        (a == b).float().mean() for a, b in zip((p for p in one.parameters() if p.dim() == 2), weights, strict=True)
    ]
    assert min(same) > 0.9  # sums in another order


def test_grids_that_are_there_are_kept():
    model, images = wide()

    class Narrow:
        name = "narrow"

        def __call__(self, calibration):
            for name, tap in taps_of(calibration.model):
                if name.endswith("weight"):
                    tap.scale = tap.scale * 0.9

    plain = quantize(model, [images], "w3a4", [*PREPARE, Round()])
    ours = quantize(model, [images], "w3a4", [*PREPARE, Round(), Narrow(), GPTQ()])
    tap, fitted = (dict(taps_of(m))["blocks.0.mlp.fc1.weight"] for m in (ours, plain))
    torch.testing.assert_close(tap.scale, 0.9 * fitted.scale)
    latent = ours.blocks[0].mlp.fc1._parameters["weight"]
    assert torch.equal(tap(latent), latent)


def test_the_user_s_network_is_untouched_and_products_may_stay_in_float():
    model, images = wide()
    before = copy.deepcopy(model)
    ours = quantize(model, [images], "w3a4", [*PREPARE, GPTQ()], allow=["blocks.1.*"])
    assert same_state(model, before)
    assert torch.equal(ours.blocks[1].mlp.fc1._parameters["weight"], model.blocks[1].mlp.fc1.weight)
    assert not torch.equal(ours.blocks[0].mlp.fc1._parameters["weight"], model.blocks[0].mlp.fc1.weight)


def test_saved_and_loaded(tmp_path):
    recipe = RECIPES["vit"]
    torch.manual_seed(0)
    model = timm.create_model(recipe["architecture"], **recipe["arguments"]).eval()
    images = torch.randn(4, 1, 32, 32)
    ours = quantize(model, [images], "w2a4", [*PREPARE, GPTQ(ridge=RidgeCorrection())])
    save(ours, tmp_path / "q.safetensors", recipe=recipe, preprocessing=LOOKS, protocol={})
    loaded = load(tmp_path / "q.safetensors")
    assert torch.equal(run(loaded, images), run(ours, images))


def test_with_the_ridge_the_outputs_are_nearer_to_the_float_network_s():
    model, images = wide()
    expected = run(model, images)
    plain, ridge = (
        (run(quantize(model, [images], "w2a2", [*PREPARE, step]), images) - expected).norm()
        for step in (GPTQ(), GPTQ(ridge=RidgeCorrection()))
    )
    assert ridge < 0.8 * plain


def test_inputs_that_overflow_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1e30)
    with pytest.raises(PlanishError, match=r"1\.weight: inputs of this layer are not finite or too large"):
        quantize(model, [torch.randn(4, 3)], "w4", [GPTQ()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damp": 0.0}, "damp is 0.0: give a share"),
        ({"damp": float("inf")}, "damp is inf: give a share"),
        ({"inputs": "exact"}, "inputs is 'exact': choose one of quantized, float"),
        ({"block": 0}, "block is 0: give a number of columns"),
        ({"inputs": "float", "ridge": RidgeCorrection()}, "ridge corrects for quantized inputs"),
    ],
)
def test_options_without_a_meaning(options, message):
    with pytest.raises(PlanishError, match=message):
        GPTQ(**options)


def test_long_inputs_count_less_if_it_is_robust():
    torch.manual_seed(8)
    layer, x = nn.Linear(6, 4), torch.randn(40, 6)
    x[0] *= 100
    scheme = replace(Scheme.parse("w3"), edge_bits=None)
    grid = dict(taps_of(quantize(nn.Sequential(layer), [x], scheme, [Round()])))["0.weight"].grid
    lengths = 1 + x.square().sum(1)  # with the one of the bias
    weights, found = 1 / (1 + lengths / lengths.median()), {}
    for robust, weight in ((False, torch.ones(40)), (True, weights)):
        expected = gptq_round(layer.weight.detach()[None], (x.T * weight @ x)[None], grid)[0]
        ours = quantize(nn.Sequential(layer), [x], scheme, [GPTQ(robust=robust)])
        found[robust] = ours[0]._parameters["weight"].detach()
        torch.testing.assert_close(found[robust], expected)
    assert not torch.equal(found[False], found[True])
