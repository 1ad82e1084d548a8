"""The ridge correction against least squares on the stacked system, and what it promises."""

import copy

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.ridge import RidgeCorrection, solve_ridge
from tests.network.zoo import build
from tests.ptq.test_gptq import Keep, chain, chain_layer, columns_of, wide
from tests.ptq.test_quantize import run, same_state

LAM = 0.3


def least_squares(x, e, lam, ones):
    """(R, K) for x (K, M) and e (R, M): the penalty as further rows of an ordinary least-squares problem."""
    x, e = x.double(), e.double()
    k = len(x)
    weight = (lam * x.square().sum(1).mean()).sqrt()
    rows, wanted = torch.cat([x.T, weight * torch.eye(k).double()]), torch.cat([e.T, torch.zeros(k, len(e)).double()])
    if ones:
        rows = torch.cat([rows, torch.cat([torch.ones(x.shape[1]), torch.zeros(k)])[:, None].double()], 1)
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


@pytest.mark.parametrize("ones", [False, True])
def test_it_is_the_least_squares_solution_of_every_group(ones):
    torch.manual_seed(0)
    x, e = torch.randn(2, 7, 30) + 1, torch.randn(2, 4, 30)
    rows = torch.cat([x, torch.ones(2, 1, 30)], 1) if ones else x
    rows = rows.double()
    ours = solve_ridge(rows @ rows.mT, e.double() @ rows.mT, LAM, ones=ones)
    for g in range(2):
        torch.testing.assert_close(ours[g], least_squares(x[g], e[g], LAM, ones))


def test_inputs_that_are_always_zero_change_nothing():
    gram, cross = torch.zeros(1, 3, 3).double(), torch.zeros(1, 2, 3).double()
    assert not solve_ridge(gram, cross, LAM, ones=False).any()
    gram[0, -1, -1], cross[0, :, -1] = 10, 5  # only the bias sees anything
    assert torch.equal(solve_ridge(gram, cross, LAM, ones=True)[0], torch.tensor([[0, 0, 0.5]] * 2).double())


@torch.no_grad()
def test_the_pass_on_a_chain_is_what_a_loop_over_its_layers_gives():
    model = chain()
    model[6].bias = None
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    prepared = quantize(model, [images], "w3a3", [FoldBatchNorm(), Calibrate()])
    ours = quantize(model, images.split(9), "w3a3", [FoldBatchNorm(), Calibrate(), RidgeCorrection(LAM)])
    taps, quantized, exact = dict(taps_of(prepared)), images, images
    for i, module in enumerate(prepared):
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            quantized, exact = module(quantized), module(exact)
            continue
        weight, bias = module._parameters["weight"], module.bias
        plain = chain_layer(module, weight)
        exact, shown = plain(exact), taps[f"{i}.input"](quantized)
        missing, groups = exact - plain(shown), getattr(module, "groups", 1)
        e = missing.transpose(0, 1).flatten(1).chunk(groups)
        change = [least_squares(x, e[g], LAM, bias is not None) for g, x in enumerate(columns_of(module, shown))]
        change = torch.cat(change).float()
        if bias is not None:
            bias.add_(change[:, -1])
            change = change[:, :-1]
        weight.add_(change.reshape(weight.shape))
        torch.testing.assert_close(ours[i]._parameters["weight"], weight, atol=1e-4, rtol=1e-4)
        assert (ours[i].bias is None) == (bias is None)
        quantized = module(quantized)
    torch.testing.assert_close(run(ours, images), quantized, atol=1e-3, rtol=1e-3)


def test_the_mean_of_the_logits_is_the_float_network_s_whatever_lam_is():
    model, images = wide()
    for lam in (1e-3, 1e6):
        ours = quantize(model, [images], "w4a2", [Calibrate(), RidgeCorrection(lam)])
        torch.testing.assert_close(run(ours, images).mean(0), run(model, images).mean(0), atol=1e-4, rtol=1e-3)


def test_less_error_at_the_logits_and_more_penalty_moves_the_weights_less():
    model, images = wide()
    expected = run(model, images)
    prepared = quantize(model, [images], "w8a2", [Calibrate()])
    errors, moves = [(run(prepared, images) - expected).norm()], []
    for lam in (0.01, 1.0, 100.0):
        ours = quantize(model, [images], "w8a2", [Calibrate(), RidgeCorrection(lam)])
        errors.append((run(ours, images) - expected).norm())
        moves.append((ours.head._parameters["weight"] - model.head.weight).norm())
    assert errors[1] < 0.5 * errors[0]
    assert moves == sorted(moves, reverse=True)


@pytest.mark.parametrize("name", ["convolutions", "gpt2", "twice", "encoder", "hf_vit_sdpa"])
def test_on_many_networks(name):
    model, example = build(name)
    before = copy.deepcopy(model)
    one, two = (
        quantize(model, [example], "w4a3", [FoldBatchNorm(), Calibrate(), RidgeCorrection(), Round()]) for _ in "ab"
    )
    assert same_state(one, two)
    assert same_state(model, before)
    assert run(one, example).isfinite().all()


def test_with_activations_in_float_there_is_nothing_to_do():
    model, images = wide()
    records = []
    ours = quantize(model, [images], "w3", [RidgeCorrection(), Keep(records), Round()])
    assert same_state(ours, quantize(model, [images], "w3", [Round()]))
    (note,) = (record for record in records if record["event"] == "note")
    assert "no activation is quantized" in note["text"]


def test_activations_that_overflow_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1e30)
    with pytest.raises(PlanishError, match=r"1\.weight: inputs or outputs of this layer are not finite or too large"):
        quantize(model, [torch.randn(4, 3)], "w4a4", [Calibrate(), RidgeCorrection()])


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan"), float("inf")])
def test_a_penalty_without_a_meaning(lam):
    with pytest.raises(PlanishError, match=f"ridge: lam is {lam}: give a share of the mean diagonal above 0"):
        RidgeCorrection(lam)
