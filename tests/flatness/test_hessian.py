"""The operator against the matrix that torch.func computes, and against curvlinops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from planish.errors import PlanishError
from planish.flatness.hessian import Hessian
from tests.flatness.hessians import Batches, dense_hessian, double_problem, spelled_out, true_hessian
from tests.flatness.networks import attention_net, conv_net, images
from tests.flatness.quadratic import Quadratic, mean_output, nothing


def encoder_net() -> nn.Module:
    """PyTorch's own encoder layer, which has a fused path of its own in evaluation mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
    return nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(64, 5)).eval()


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_it_is_the_dense_hessian(make):
    found = Hessian(*double_problem(make)).dense()
    torch.testing.assert_close(found, true_hessian(make), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_in_single_precision(make):
    hessian = Hessian(make(), images(make(), 20, 12))
    vectors = torch.randn(4, hessian.size)
    found, expected = hessian.multiply(vectors), vectors.double() @ true_hessian(make)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def _gradient(model: nn.Module, batches: Batches) -> torch.Tensor:
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("make", [encoder_net, attention_net])
def test_it_is_the_difference_of_gradients(make):
    model, batches = double_problem(make)
    weights = parameters_to_vector(model.parameters()).detach()
    vector, step = torch.randn(len(weights), dtype=torch.float64), 1e-5
    found = Hessian(model, batches).multiply(vector[None])[0]
    sides = []
    for side in (1, -1):
        vector_to_parameters(weights + side * step * vector, model.parameters())
        sides.append(_gradient(model, batches))
    expected = (sides[0] - sides[1]) / (2 * step)
    assert (found - expected).norm() <= 1e-7 * expected.norm()


def test_a_product_takes_and_gives_one_tensor_for_each_parameter():
    model, batches = double_problem(attention_net)
    vector = [torch.randn_like(p) for p in model.parameters()]
    found = Hessian(model, batches).matvec(vector)
    assert [part.shape for part in found] == [p.shape for p in model.parameters()]
    expected = true_hessian(attention_net) @ torch.cat([part.flatten() for part in vector])
    torch.testing.assert_close(torch.cat([part.flatten() for part in found]), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("memory", [0, 200_000])
def test_little_memory_changes_nothing(memory):
    model, batches = double_problem(attention_net)
    whole, cut = Hessian(model, batches), Hessian(model, batches, memory=memory)
    assert whole._kept == len(whole._chunks) == 2
    assert len(cut._chunks) > 2
    assert (0 < cut._kept < len(cut._chunks)) == bool(memory)
    vectors = torch.randn(3, whole.size, dtype=torch.float64)
    for _ in range(2):  # the second time from graphs that were kept
        torch.testing.assert_close(cut.multiply(vectors), whole.multiply(vectors), rtol=1e-9, atol=1e-11)


def test_some_parameters_give_a_block():
    model, batches = double_problem(conv_net)
    names = ["0.weight", "4.bias"]
    some = {name: model.get_parameter(name) for name in names}
    expected = dense_hessian(model, batches, names)
    torch.testing.assert_close(Hessian(model, batches, some).dense(), expected, rtol=1e-9, atol=1e-11)


def test_another_loss():
    model, batches = double_problem(conv_net)
    some = {"7.weight": model[7].weight}

    def smoothed(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    expected = dense_hessian(model, batches, list(some), loss=smoothed)
    torch.testing.assert_close(Hessian(model, batches, some, smoothed).dense(), expected, rtol=1e-9, atol=1e-11)


def test_everything_is_as_it_was():
    model = conv_net().train()
    batches = images(model)
    model[1].eval()
    model[3].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        hessian = Hessian(model, batches, {"3.weight": model[3].weight})
        hessian.multiply(torch.ones(1, hessian.size))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["3.weight"]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_are_differentiated_all_the_same():
    model = attention_net()
    expected = Hessian(model, images(model)).multiply(torch.ones(1, 421))
    found = Hessian(model.requires_grad_(False), images(model)).multiply(torch.ones(1, 421))
    assert torch.equal(found, expected)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("loss", [lambda logits, labels: logits.mean(), lambda logits, labels: torch.tensor(1.0)])
def test_a_loss_without_curvature_has_none(loss):
    model = nn.Linear(3, 2)
    hessian = Hessian(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], loss=loss)
    assert torch.equal(hessian.dense(), torch.zeros(8, 8, dtype=torch.float64))


def test_batches_may_be_mappings():
    class Named(nn.Linear):
        def forward(self, pixels):
            return {"logits": super().forward(pixels)}

    torch.manual_seed(0)
    model, x, y = Named(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    plain = nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    found, expected = Hessian(model, [{"pixels": x, "labels": y}]).dense(), Hessian(plain, [(x, y)]).dense()
    assert torch.equal(found, expected)
    assert expected.norm() > 0


def test_products_are_counted():
    hessian = Hessian(Quadratic(torch.ones(3)), nothing(), loss=mean_output)
    seen = []
    hessian.notify = lambda: seen.append(hessian.products)
    hessian.multiply(torch.eye(3)[:2])
    hessian.matvec([torch.ones(3)])
    assert seen == [2, 3]


def test_errors():
    model = conv_net()
    batches = images(model)
    with pytest.raises(PlanishError, match="there is no batch"):
        Hessian(model, [])
    with pytest.raises(PlanishError, match="needs a loss and so labels"):
        Hessian(model, [x for x, _ in batches])
    with pytest.raises(PlanishError, match="no parameters"):
        Hessian(model, batches, {})
    with pytest.raises(PlanishError, match=r"w is not a parameter of the model"):
        Hessian(model, batches, {"w": conv_net()[0].weight})
    with pytest.raises(PlanishError, match=r"got torch.bfloat16"):
        Hessian(conv_net().bfloat16(), batches)
    bad = [(batches[0][0] * float("inf"), batches[0][1])]
    with pytest.raises(PlanishError, match="batch 1 of the diagnosis loader holds infinite values"):
        Hessian(model, bad)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(PlanishError, match="not finite"):
        Hessian(model, batches).dense()


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_against_curvlinops(make):
    curvlinops = pytest.importorskip("curvlinops")
    model, batches = double_problem(make)
    twin = spelled_out(model)  # curvlinops computes with torch.func
    other = curvlinops.HessianLinearOperator(
        twin, nn.CrossEntropyLoss(), list(twin.parameters()), batches, check_deterministic=False
    )
    hessian = Hessian(model, batches)
    vectors = torch.randn(2, hessian.size, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = (other @ vectors.T).T
    torch.testing.assert_close(hessian.multiply(vectors), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_on_cuda(make):
    model = make()
    batches = images(model)
    vectors = torch.randn(4, sum(p.numel() for p in model.parameters()))
    expected = Hessian(model, batches).multiply(vectors)
    found = Hessian(make().cuda(), batches).multiply(vectors.cuda()).cpu()
    assert (found - expected).norm() <= 1e-4 * expected.norm()
