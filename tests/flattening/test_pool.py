import pytest
import scipy.stats
import torch

from planish.errors import PlanishError
from planish.flattening import pool as module
from planish.flattening.pool import ALIGN, LIMIT, RENEWED, NoisePool, grouped

torch.set_num_threads(1)

COUNT = 100_000


def corr(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize(("law", "kurtosis"), [("gaussian", 3.0), ("uniform", 1.8)])
def test_moments_and_distribution(law, kurtosis):
    pool = NoisePool(law, 0)
    pieces = []
    for step in range(10):
        pool.renew(step)
        pieces.append(pool.read(COUNT).clone())
    x = torch.cat(pieces).double()
    assert x.mean().abs() < 5 / COUNT**0.5
    assert x.var() == pytest.approx(1, abs=0.01)
    assert (x**4).mean() / x.var() ** 2 == pytest.approx(kurtosis, abs=0.03)
    torch.manual_seed(1)
    fresh = torch.randn(COUNT) if law == "gaussian" else (torch.rand(COUNT) - 0.5) * 12**0.5
    # pieces that overlap are not independent draws, so one piece is tested at a time
    p = [scipy.stats.ks_2samp(piece.numpy(), fresh.numpy()).pvalue for piece in pieces[:3]]
    assert min(p) > 1e-3
    assert scipy.stats.ks_2samp(1.02 * pieces[0].numpy() + 0.02, fresh.numpy()).pvalue < 1e-3  # it would be noticed


def test_steps_and_sites_are_uncorrelated():
    pool = NoisePool("gaussian", 3)
    previous, worst = None, 0.0
    for step in range(40):
        pool.renew(step)
        first, second = pool.read(COUNT).clone(), pool.read(COUNT).clone()
        worst = max(worst, abs(corr(first, second)))
        if previous is not None:
            worst = max(worst, abs(corr(first, previous)))
        previous = first
    assert worst < 5.5 / COUNT**0.5


def test_renewal_goes_round_the_pool():
    pool = NoisePool("gaussian", 0, size=4 * RENEWED)
    before = pool.values.clone()
    for step in range(4):
        pool.renew(step)
        changed = (pool.values != before).view(4, RENEWED).float().mean(1)
        assert (changed[: step + 1] > 0.99).all()
        assert (changed[step + 1 :] == 0).all()
    again = pool.values.clone()
    pool.renew(4)
    assert not torch.equal(again[:RENEWED], pool.values[:RENEWED])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(4, 6).t(),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(3, 1, 4).expand(3, 5, 4),
        torch.zeros(()),
        torch.zeros(0, 4),
    ],
)
def test_any_memory_order(x):
    pool = NoisePool("gaussian", 0)
    noise = pool.like(x)
    assert noise.shape == x.shape
    assert torch.unique(noise).numel() == x.numel()  # every element has a draw of its own
    if x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.shape == (6, 4):
        assert noise.stride() == x.stride()


def test_tensors_longer_than_the_pool():
    pool = NoisePool("gaussian", 0, size=1000)
    noise = pool.read(5000).clone()
    assert len(pool.values) >= 5000 + ALIGN
    assert noise.var() == pytest.approx(1, abs=0.1)
    assert abs(corr(noise[:1000], noise[1000:2000])) < 0.2


def test_grouping_of_long_batches(monkeypatch):
    assert grouped(torch.zeros(8, 4)).shape == (8, 4)
    monkeypatch.setattr(module, "LIMIT", 100)
    assert grouped(torch.zeros(8, 30)).shape == (4, 2, 30)
    assert grouped(torch.zeros(7, 30)).shape == (7, 1, 30)  # a prime number of images
    assert grouped(torch.zeros(1, 300)).shape == (1, 300)
    x = torch.zeros(30, 8).t()
    assert grouped(x) is x
    assert LIMIT == 1 << 22


def test_deterministic_by_seed_and_step():
    def read(seed, steps):
        pool = NoisePool("gaussian", seed)
        for step in steps:
            pool.renew(step)
        return pool.read(1000).clone()

    assert torch.equal(read(1, [0, 1]), read(1, [0, 1]))
    assert not torch.equal(read(1, [0, 1]), read(2, [0, 1]))
    assert not torch.equal(read(1, [0, 1]), read(1, [0, 2]))


def test_state_round_trip():
    pool = NoisePool("uniform", 4, size=3 * RENEWED)
    pool.renew(0)
    pool.read(10 * RENEWED)  # it grows
    other = NoisePool("uniform", 4, size=3 * RENEWED)
    other.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in pool.state_dict().items()})
    for step in range(1, 6):
        pool.renew(step)
        other.renew(step)
        assert torch.equal(pool.read(500), other.read(500))
    assert torch.equal(pool.values, other.values)


def test_the_state_of_a_pool_with_another_seed_says_how_far_this_one_has_come():
    """Of several processes, each with its own seed, only the first writes a checkpoint."""

    def run(seed, steps):
        pool = NoisePool("gaussian", seed, size=3 * RENEWED)
        for step in range(steps):
            pool.renew(step)
            pool.read(2 * RENEWED if step < 2 else 5 * RENEWED if step < 5 else 9 * RENEWED)  # it grows twice
        return pool

    for steps in (0, 1, 4, 7):
        other = NoisePool("gaussian", 2)
        other.load_state_dict(run(1, steps).state_dict())
        whole = run(2, steps)
        for step in range(steps, steps + 3):
            whole.renew(step)
            other.renew(step)
            assert torch.equal(whole.read(500), other.read(500))
        assert torch.equal(whole.values, other.values)


def test_law_is_checked():
    with pytest.raises(PlanishError, match="gaussian or uniform"):
        NoisePool("cauchy", 0)
