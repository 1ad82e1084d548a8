"""The ridge correction against least squares on the stacked system, and what it promises."""

import copy

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize, ridge
from planish.ptq.layers import LayerCall
from planish.ptq.ridge import FOLDS, LAMS, Moments, RidgeCorrection, moments, solve_ridge
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


def layer_call(x):
    weight = torch.zeros(3, x.shape[-1])
    return LayerCall("layer.weight", torch.nn.functional.linear, {"input": x, "weight": weight, "bias": None})


def test_robust_sums_are_those_of_weighted_columns():
    torch.manual_seed(0)
    calls = [(layer_call(torch.randn(4, 5, 6)), torch.randn(4, 5, 3)) for _ in range(2)]
    calls[0][1][0, 0] *= 1e3  # a token that would outweigh all others
    gram, cross = torch.zeros(7, 7).double(), torch.zeros(3, 7).double()
    for call, missing in calls:
        x, e = call.args["input"].flatten(0, 1).double(), missing.flatten(0, 1).double()
        lengths = e.square().sum(1)
        for row, lacks, length in zip(x, e, lengths, strict=True):
            weight = 1 / (1 + length / lengths.median())
            row = torch.cat([row, torch.ones(1)])
            gram += weight * row[:, None] * row
            cross += weight * lacks[:, None] * row
    ours = moments(calls, robust=True)
    torch.testing.assert_close(ours.gram[0], gram, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.cross[0], cross, atol=1e-4, rtol=1e-4)
    alone = moments([(call, None) for call, _ in calls], robust=True)
    assert alone.cross is None
    assert not torch.allclose(alone.gram, ours.gram, rtol=0.1)  # here the inputs decide


@pytest.mark.parametrize("bias", [False, True])
def test_a_lam_that_is_chosen_predicts_images_left_out_best(bias):
    torch.manual_seed(1)
    x = torch.randn(2, 40, 30) * torch.logspace(0, -2, 30)
    e = x @ torch.randn(30, 3) + 2 * torch.randn(2, 40, 3) + bias
    ours = moments([(layer_call(part), lacks) for part, lacks in zip(x, e, strict=True)], folds=True)
    assert len(ours.folds) == FOLDS
    end = None if bias else -1
    costs = {}
    for lam in LAMS:
        costs[lam] = 0.0
        for k in range(FOLDS):
            inside = slice(10 * k, 10 * k + 10)
            left = (
                torch.cat([x[:, : 10 * k], x[:, 10 * k + 10 :]], 1).flatten(0, 1),
                torch.cat([e[:, : 10 * k], e[:, 10 * k + 10 :]], 1).flatten(0, 1),
            )
            change = least_squares(left[0].T, left[1].T, lam, bias)
            shown, wanted = x[:, inside].flatten(0, 1).double(), e[:, inside].flatten(0, 1).double()
            if bias:
                shown = torch.cat([shown, torch.ones(len(shown), 1)], 1)
            costs[lam] += float((wanted - shown @ change.T).square().sum() - wanted.square().sum())
    best = min(costs, key=costs.get)
    assert best not in (LAMS[0], LAMS[-1])
    expected = solve_ridge(ours.gram[:, :end, :end], ours.cross[:, :, :end], best, ones=bias)
    torch.testing.assert_close(ours.change(None, bias=bias), expected)


def test_a_wide_layer_is_judged_on_the_first_part_alone(monkeypatch):
    torch.manual_seed(5)
    x = torch.randn(1, 80, 30)
    e = x @ torch.randn(30, 3)
    e[:, 20:40] = torch.randn(1, 20, 3)  # the second part
    ours = moments([(layer_call(x), e)], folds=True)
    monkeypatch.setattr(ridge, "WIDE", 30)
    (first, *_) = ours.folds
    alone = Moments(ours.gram, ours.cross, (first,))
    torch.testing.assert_close(ours.change(None, bias=False), alone.change(None, bias=False))
    monkeypatch.setattr(ridge, "WIDE", 31)
    assert not torch.equal(ours.change(None, bias=False), alone.change(None, bias=False))


def test_columns_that_lack_nothing_do_not_take_all_the_weight():
    torch.manual_seed(6)
    x, e = torch.randn(1, 20, 3), torch.zeros(1, 20, 3)
    e[:, :8] = 0.1 * x[:, :8]
    sums = [moments([(layer_call(x), e)], robust=robust) for robust in (False, True)]
    torch.testing.assert_close(sums[1].cross, sums[0].cross)


def test_no_change_where_nothing_can_be_predicted():
    torch.manual_seed(2)
    x, e = torch.randn(1, 80, 30), torch.randn(1, 80, 3)
    assert not moments([(layer_call(x), e)], folds=True).change(None, bias=False).any()
    assert moments([(layer_call(x), e)]).change(0.1, bias=False).any()


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


@torch.no_grad()
def test_a_few_tokens_with_large_errors_do_not_spoil_the_others():
    """Their error, which the others do not share, is 300 times as large: the plain correction is fitted to it alone."""
    torch.manual_seed(3)
    x = torch.randn(64, 16, 8)
    e = 0.1 * x[..., :3].clone()
    e[:, 0] += 300 * x[:, 0] @ torch.randn(8, 3)
    rest = []
    for robust in (False, True):
        sums = moments([(layer_call(x), e)], robust=robust, folds=True)
        change = sums.change(None, bias=False)[0].float()
        rest.append(float((e - x @ change.T)[:, 1:].square().mean()))
    assert rest[1] < 0.3 * float(e[:, 1:].square().mean()) < rest[0]


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan"), float("inf")])
def test_a_penalty_without_a_meaning(lam):
    with pytest.raises(PlanishError, match=f"ridge: lam is {lam}: give a share of the mean diagonal above 0"):
        RidgeCorrection(lam)


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (6, 1), (6, 2)])
def test_a_lam_can_be_chosen_from_any_number_of_images_in_a_batch(count, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    images = list(torch.randn(count, 4).split(batch))
    quantized = quantize(model, images, "w4a3", [Calibrate(), RidgeCorrection(lam=None), Round()])
    plain = quantize(model, images, "w4a3", [Calibrate(), Round()])
    assert torch.isfinite(quantized(images[0])).all()
    if count == 1:  # a single column leaves nothing to predict it from
        assert torch.equal(quantized(images[0]), plain(images[0]))


def test_folds_of_calls_with_one_column_each():
    torch.manual_seed(0)
    calls = [(layer_call(torch.randn(1, 1, 6)), torch.randn(1, 1, 3)) for _ in range(6)]
    ours = moments(calls, folds=True)
    assert [round(float(gram[0, -1, -1])) for gram, _ in ours.folds] == [2, 2, 1, 1]  # columns: the last input is a one
    torch.testing.assert_close(sum(gram for gram, _ in ours.folds), ours.gram)
    assert moments(calls[:1], folds=True).folds == ()
