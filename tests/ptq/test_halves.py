"""ERQ's rounding in halves against a loop over rows, and what it promises."""

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import dequantize, fake_quantize
from planish.functional import quantize as codes_of
from planish.network import taps_of
from planish.ptq import Round, quantize
from planish.ptq.gptq import GPTQ
from planish.ptq.halves import halves_round, refine_roundings
from planish.ptq.ridge import RidgeCorrection
from planish.quantizers import fit_grid
from tests.ptq.test_gptq import FORMATS, PREPARE, layer, wide
from tests.ptq.test_quantize import run


def error(weight, rounded, hessian):
    d = rounded.double() - weight.double()
    return ((d @ hessian) * d).sum(-1)


def refined(weight, codes, hessian, grid, flips):
    """One row: try every move of one code by one, take the best, repeat."""
    for _ in range(flips):
        tries = [codes]
        for i in range(len(codes)):
            for step in (-1, 1):
                other = codes.clone()
                other[i] += step
                if grid.qmin <= other[i] <= grid.qmax:
                    tries.append(other)
        errors = torch.stack([error(weight, dequantize(some, grid), hessian) for some in tries])
        if errors.argmin() == 0:
            break
        codes = tries[int(errors.argmin())]
    return codes


def of_row(grid, r, columns=slice(None)):
    shape = (6, 12)
    return grid._replace(
        scale=grid.scale.expand(shape)[r, columns], zero_point=grid.zero_point.expand(shape)[r, columns]
    )


@pytest.mark.parametrize("flips", [1, 3, 100])
@pytest.mark.parametrize("name", ["2 bits", "4 bits", "affine", "group"])
def test_refinement_is_the_best_move_again_and_again(name, flips):
    weight, x = layer()
    grid, hessian = fit_grid(weight, FORMATS[name]), x @ x.T
    weight = weight.double()
    first = codes_of(weight, grid)
    ours = refine_roundings(weight[None], first[None], hessian[None], grid, flips)[0]
    for r in range(len(weight)):
        assert torch.equal(ours[r], refined(weight[r], first[r], hessian, of_row(grid, r), flips))
    before, after = (error(weight, dequantize(some, grid), hessian) for some in (first, ours))
    assert (after <= before).all()
    assert after.sum() < before.sum()


def loop(weight, hessian, grid, lam, flips, act_order):
    """One (R, K) weight, row by row; the ridge by an explicit inverse."""
    w, k = weight.double().clone(), weight.shape[1]
    left = list(range(k))
    if act_order:
        left.sort(key=lambda i: -hessian[i, i].item())
    out = torch.empty_like(w)
    while left:
        now, left = left[: (len(left) + 1) // 2], left[(len(left) + 1) // 2 :]
        for r in range(len(w)):
            own = of_row(grid, r, now)
            codes = refined(w[r, now], codes_of(w[r, now], own), hessian[now][:, now], own, flips)
            out[r, now] = dequantize(codes, own)
        if left:
            rest = hessian[left][:, left]
            ridge = torch.linalg.inv(rest + lam * rest.diagonal().mean() * torch.eye(len(left)).double())
            w[:, left] += (w[:, now] - out[:, now]) @ hessian[now][:, left] @ ridge
    return out.float()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["2 bits", "3 bits", "affine", "group"])
def test_it_is_the_loop_over_rows_and_halves(name, act_order):
    weight, x = layer(seed=2)
    grid, hessian = fit_grid(weight, FORMATS[name]), x @ x.T
    ours = halves_round(weight[None], hessian[None], grid, lam=0.3, flips=4, act_order=act_order)[0]
    torch.testing.assert_close(ours, loop(weight, hessian, grid, 0.3, 4, act_order))
    assert ours.dtype == torch.float32
    assert torch.equal(fake_quantize(ours, grid), ours)


@pytest.mark.parametrize("name", FORMATS)
def test_the_output_is_nearer_than_with_rounding_to_nearest(name):
    for seed in range(4):
        weight, x = layer(seed=seed)
        grid, hessian = fit_grid(weight, FORMATS[name]), x @ x.T
        ours, nearest = halves_round(weight[None], hessian[None], grid)[0], fake_quantize(weight, grid)
        assert error(weight, ours, hessian).sum() < 0.9 * error(weight, nearest, hessian).sum()


def test_groups_are_rounded_each_on_its_own():
    (one, x), (two, y) = layer(), layer(seed=3)
    both, hessian = torch.stack([one, two]), torch.stack([x @ x.T, y @ y.T])
    grid = fit_grid(both.flatten(0, 1), FORMATS["3 bits"])
    grid = grid._replace(scale=grid.scale.reshape(2, 6, 1), zero_point=torch.zeros(()))
    ours = halves_round(both, hessian, grid)
    for g in range(2):
        alone = halves_round(both[g : g + 1], hessian[g : g + 1], grid._replace(scale=grid.scale[g : g + 1]))
        assert torch.equal(ours[g], alone[0])


def test_inputs_that_are_always_zero():
    weight, _ = layer()
    grid = fit_grid(weight, FORMATS["3 bits"])
    assert torch.equal(halves_round(weight[None], torch.zeros(1, 12, 12), grid)[0], fake_quantize(weight, grid))


@pytest.mark.parametrize("ridge", [None, RidgeCorrection()])
def test_in_a_network_it_lies_on_the_grids_and_comes_nearer_than_nearest_rounding(ridge):
    model, images = wide()
    expected = run(model, images)
    nearest = quantize(model, images.split(32), "w2a4", [*PREPARE, Round()])
    ours, again = (
        quantize(model, images.split(32), "w2a4", [*PREPARE, GPTQ(ridge=ridge, solver="halves")]) for _ in "ab"
    )
    assert (run(ours, images) - expected).norm() < 0.8 * (run(nearest, images) - expected).norm()
    assert torch.equal(run(ours, images), run(again, images))
    tap, latent = dict(taps_of(ours))["blocks.0.mlp.fc1.weight"], ours.blocks[0].mlp.fc1._parameters["weight"]
    assert torch.equal(tap(latent), latent)


def test_another_solver():
    with pytest.raises(PlanishError, match="solver is 'rows': choose one of columns, halves"):
        GPTQ(solver="rows")
