import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.training import SAM, Ingredient
from tests.training import tiny

H = torch.tensor([[3.0, 1.0], [1.0, 2.0]])


class Quadratic(nn.Module):
    """1/2 w^T H w + b, whatever the input; w a matrix (1, 2), b a vector."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.7, -0.4]]))
        self.b = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x):
        return 0.5 * (self.w @ H @ self.w.T) + 0.5 * self.b**2


class Value(Ingredient):
    def loss(self, run, inputs, labels, logits):
        return logits.sum()


@pytest.mark.parametrize("adaptive", [False, True])
def test_equals_the_papers_two_passes(adaptive):
    rho, eta, lr = 0.3, 0.05, 0.1
    model, twin = Quadratic(), Quadratic()
    batches = [torch.zeros(1, 1)] * 3
    run_settings = tiny.settings(epochs=1, lr=lr, weight_decay=0.0, clip_norm=None, warmup=0.0, final_lr=1.0)
    tiny.fit(model, [SAM(rho, adaptive, eta), Value()], batches, task=False, run_settings=run_settings)

    w, b = twin.w.detach()[0].double(), twin.b.detach().double()
    hessian, mw, mb = H.double(), None, None
    for _ in range(3):
        gw, gb = hessian @ w, b
        # ASAM: eps = rho T^2 g / |T g|, T = |w| + eta for the matrix and 1 for the bias; SAM: T = 1
        tw = w.abs() + eta if adaptive else torch.ones(2).double()
        norm = ((tw * gw).pow(2).sum() + gb.pow(2).sum()).sqrt()
        gw, gb = hessian @ (w + rho * tw**2 * gw / norm), b + rho * gb / norm
        mw, mb = (gw, gb) if mw is None else (0.9 * mw + gw, 0.9 * mb + gb)
        w, b = w - lr * (gw + 0.9 * mw), b - lr * (gb + 0.9 * mb)
    torch.testing.assert_close(model.w.detach()[0].double(), w, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.b.detach().double(), b, atol=1e-6, rtol=1e-6)


def test_batchnorm_counts_the_first_pass_only():
    sam, plain = tiny.conv(), tiny.conv()
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 4)]
    tiny.fit(sam, [SAM(0.5)], batches, run_settings=tiny.settings(epochs=1))
    tiny.fit(plain, [], batches, run_settings=tiny.settings(epochs=1))
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        for layer in (1, 5):
            assert torch.equal(getattr(sam[layer], key), getattr(plain[layer], key))
    assert sam[1].num_batches_tracked == 1
    assert sam[1].momentum == 0.1
    assert not torch.equal(sam[0].weight, plain[0].weight)


def test_weights_come_back_when_the_second_pass_fails():
    class Once(Ingredient):
        calls = 0

        def loss(self, run, inputs, labels, logits):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("second")

    model = tiny.conv()
    with pytest.raises(RuntimeError, match="second"):
        tiny.fit(model, [SAM(0.5), Once()])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny.conv().parameters(), strict=True))
    assert model[1].momentum == 0.1
    assert model[1].num_batches_tracked is not None


def test_radius_is_positive():
    with pytest.raises(PlanishError, match="rho"):
        SAM(0.0)
