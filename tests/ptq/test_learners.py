"""How roundings are learned, against the equations."""

import math

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.ptq.learners import (
    LEARNERS,
    Coin,
    DroppingTap,
    SignRounding,
    SignSGD,
    SoftRounding,
    get_learner,
    inverse_rectified_sigmoid,
    mix,
    penalty_beta,
    rectified_sigmoid,
)
from planish.quantizers import LearnedQuantizer, fit_grid
from planish.scheme import Format

FORMATS = [Format(4, "channel"), Format(2, "channel", half_integer=True), Format(3, "tensor", symmetric=False)]


def weight(seed=0):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))


def made(kind, fmt, **options):
    w = weight()
    tap = kind(fmt, **options)
    tap.initialize(w, fit_grid(w, fmt))
    return tap, w


def test_the_stretched_sigmoid_reaches_both_ends_and_is_inverted():
    h = torch.linspace(0, 1, 21)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-6, rtol=1e-5)
    assert rectified_sigmoid(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]
    v = 0.3
    assert float(rectified_sigmoid(torch.tensor(v))) == pytest.approx(1.2 / (1 + math.exp(-v)) - 0.1)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.bits}")
def test_soft_weights_begin_as_they_are_and_end_at_a_neighbour(fmt):
    tap, w = made(SoftRounding, fmt)
    grid = tap.grid
    low, high = ((q - grid.zero_point + grid.offset) * grid.scale for q in (grid.qmin, grid.qmax))
    inside = (w >= low) & (w <= high)
    torch.testing.assert_close(tap(w)[inside], w[inside], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        tap.v.copy_(4 * torch.randn(6, 5))
    up = tap.v > inverse_rectified_sigmoid(torch.tensor(0.5))
    for i in range(6):
        for j in range(5):
            s = float(grid.scale.reshape(-1)[i if grid.scale.numel() > 1 else 0])
            z = float(grid.zero_point.reshape(-1)[0])
            code = math.floor(float((w / grid.scale)[i, j]) - grid.offset) + int(up[i, j]) + z
            code = min(max(code, grid.qmin), grid.qmax)
            assert float(tap.latent(w)[i, j]) == pytest.approx((code - z + grid.offset) * s, rel=1e-5, abs=1e-6)
    assert torch.equal(fake_quantize(tap.latent(w), tap.grid), tap.latent(w))


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_the_penalty_is_zero_for_decided_weights_only(beta):
    tap, _ = made(SoftRounding, FORMATS[0])
    h = rectified_sigmoid(tap.v.detach())
    twin = sum(1 - abs(2 * float(x) - 1) ** beta for x in h.flatten())
    assert float(tap.penalty(beta)) == pytest.approx(twin, rel=1e-4)
    with torch.no_grad():
        tap.v.copy_(torch.where(tap.v > 0, 9.0, -9.0))
    assert float(tap.penalty(beta)) == 0.0


def test_the_exponent_of_the_penalty_falls_from_20_to_2():
    assert penalty_beta(0.1) is None
    assert penalty_beta(0.2) == pytest.approx(20.0)
    assert penalty_beta(0.6) == pytest.approx(11.0)
    assert penalty_beta(1.0) == pytest.approx(2.0)


def test_a_learned_scale_keeps_the_integers():
    tap, w = made(SoftRounding, FORMATS[0], learn_scale=True)
    before = tap.latent(w) / tap.grid.scale
    tap(w).square().sum().backward()
    assert tap.scale.grad.abs().min() > 0
    with torch.no_grad():
        tap.scale.mul_(1.3)
    torch.testing.assert_close(tap.latent(w) / tap.grid.scale, before)
    with torch.no_grad():
        tap.scale.fill_(-1.0)
    tap.keep_valid()
    assert tap.grid.scale.min() > 0


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=lambda f: f"{f.bits}")
def test_signround_begins_at_the_nearest_and_moves_by_half_a_step(fmt):
    tap, w = made(SignRounding, fmt)
    assert torch.equal(tap.latent(w), fake_quantize(w, fit_grid(w, fmt)))
    tap(w).sum().backward()
    assert tap.v.grad.abs().sum() > 0
    assert tap.a.grad.abs().sum() > 0
    with torch.no_grad():
        tap.v.fill_(3.0)
        tap.a.fill_(0.1)
    tap.keep_valid()
    assert tap.v.max() == 0.5
    assert tap.a.min() == 0.5
    torch.testing.assert_close(fake_quantize(tap.latent(w), tap.grid), tap.latent(w))


def test_sign_descent_goes_by_the_rate_alone():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    p.grad = torch.tensor([0.001, -70.0, 0.0])
    SignSGD([{"params": [p], "lr": 0.25}], lr=1.0).step()
    assert p.tolist() == [0.75, -1.75, 3.0]


def test_a_coin_is_fair_by_its_share_and_repeats_by_its_seed():
    x = torch.zeros(1000, 900)
    masks = [Coin(0.3, seed).mask(x) for seed in (1, 1, 2)]
    assert set(masks[0].unique().tolist()) == {0.0, 1.0}
    assert masks[0].mean() == pytest.approx(0.3, abs=0.005)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    coin = Coin(0.5, 0)
    assert not torch.equal(coin.mask(x[:9]), coin.mask(x[:9]))
    assert coin.mask(torch.zeros(3000, 1000)).shape == (3000, 1000)  # more than the pool held


def test_a_dropping_tap_lets_values_pass_and_gradients_follow():
    x = torch.randn(400, 50, requires_grad=True)
    quantizer = LearnedQuantizer(Format(2, symmetric=False), per_image=True)
    quantizer.initialize(torch.empty(0), fit_grid(x, Format(2, symmetric=False)))
    out = DroppingTap(quantizer, Coin(0.5, 0))(x)
    kept = out == x
    assert kept.float().mean() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(out[~kept], quantizer(x)[~kept])
    out.sum().backward()
    assert torch.equal(x.grad[kept], torch.ones_like(x.grad[kept]))
    assert torch.equal(DroppingTap(quantizer, None)(x), quantizer(x))


def test_a_mixture_is_torchs_where():
    a, b = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = (torch.rand(4, 5) < 0.5).double()
    assert torch.equal(mix(a, b, mask), torch.where(mask.bool(), b, a))
    torch.autograd.gradcheck(lambda a, b: mix(a, b, mask), (a, b))


def test_names():
    for name, learner in LEARNERS.items():
        assert get_learner(name) is learner
    with pytest.raises(PlanishError, match=r"learned by 'best': choose one of adaround, genie, ste, signround"):
        get_learner("best")
