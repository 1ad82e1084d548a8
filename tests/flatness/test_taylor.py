"""Taylor terms against closed forms, against automatic differentiation of the weights and against differences."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.flatness.split import _parts
from planish.flatness.subject import Subject
from planish.flatness.taylor import AT_ONCE, split, taylor
from planish.network import detach
from tests.flatness.networks import attention_net, conv_net, images
from tests.network.zoo import build


def prepared(make, scheme: str = "w3a3", count: int = 40) -> Subject:
    model = make()
    return Subject.prepare(model, images(model, count), [scheme])


def test_of_a_linear_classifier_they_have_a_closed_form():
    """logits W x: with d = E x or W e, the terms are (p - onehot(y)) . d and d^T (diag p - p p^T) d / 2."""
    torch.manual_seed(0)
    x, y = torch.randn(50, 6), torch.randint(4, (50,))
    subject = Subject.prepare(
        nn.Sequential(nn.Linear(6, 4)), list(zip(x.split(20), y.split(20), strict=True)), ["w3a3"]
    )
    q, weight = subject.quantizers["w3a3"], subject.model[0].weight
    sets = {"weights": {"0.weight": q["0.weight"]}, "activations": {"0.input": q["0.input"]}, "both": q}
    found = taylor(subject, sets, subject.batches)
    p = subject.logits().softmax(1)
    of_weight, of_input = x @ (q["0.weight"](weight) - weight).T, (q["0.input"](x) - x) @ weight.T
    for part, d in {"weights": of_weight, "activations": of_input}.items():
        assert found[part].first == pytest.approx(float(((p - F.one_hot(y, 4)) * d).sum(1).mean()), rel=1e-4)
        second = (p * d * d).sum(1) - (p * d).sum(1).square()
        assert found[part].second == pytest.approx(float(second.mean()) / 2, rel=1e-4)
    assert found["both"].first == pytest.approx(found["weights"].first + found["activations"].first, rel=1e-4)
    rounded_alone = found["weights"].second + found["activations"].second
    assert found["both"].second != pytest.approx(rounded_alone, rel=1e-2)  # the cross term


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_of_weights_they_are_those_of_autograd(make):
    """Double backward through the parameters themselves, all layers in one."""
    subject = prepared(make)
    grids = subject.grids("w3a3", activations=False)
    found = taylor(subject, {"weights": grids, **{n: {n: q} for n, q in grids.items()}}, subject.batches)
    twin = copy.deepcopy(subject.model)
    detach(twin)
    x, y = torch.cat([x for x, _ in subject.batches]), torch.cat([y for _, y in subject.batches])
    weights = {name: twin.get_parameter(name) for name in grids}
    for key in ["weights", *grids]:
        named = weights if key == "weights" else {key: weights[key]}
        errors = tuple((grids[n](w) - w).detach() for n, w in named.items())

        def loss(*values: Tensor, named=named) -> Tensor:
            return F.cross_entropy(functional_call(twin, dict(zip(named, values, strict=True)), (x,)), y)

        with sdpa_kernel(SDPBackend.MATH):
            _, curved = torch.autograd.functional.vhp(loss, tuple(named.values()), errors)
            _, slope = torch.autograd.functional.vjp(loss, tuple(named.values()))
        assert found[key].first == pytest.approx(_dot(errors, slope), rel=1e-3, abs=1e-6)
        assert found[key].second == pytest.approx(_dot(errors, curved) / 2, rel=1e-3, abs=1e-7)


def _dot(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


class _Shift(nn.Module):
    """x + h e with the e of its first call."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer, self.h, self.error = quantizer, 0.0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is None:
            self.error = self.quantizer(x) - x
        return x + self.h * self.error


def test_of_activations_they_are_differences_of_the_loss():
    """In float64, on a network without kinks: central differences along the errors that the float network makes."""
    subject = prepared(attention_net)
    grids = subject.grids("w3a3", weights=False)
    sets = {"all": grids, **{p.name: _parts(p.sites, grids)["both"] for p in subject.products}}
    found = taylor(subject, sets, subject.batches)
    x, y = torch.cat([x for x, _ in subject.batches]), torch.cat([y for _, y in subject.batches])
    subject.model.double()
    for key, one in sets.items():
        taps = {name: _Shift(q) for name, q in one.items()}
        losses = []
        with torch.no_grad(), subject.tapped(taps):
            for h in (0.0, 1e-3, -1e-3):
                for tap in taps.values():
                    tap.h = h
                losses.append(float(F.cross_entropy(subject.model(x.double()), y)))
        middle, up, down = losses
        assert found[key].first == pytest.approx((up - down) / 2e-3, rel=1e-3, abs=1e-6)
        assert found[key].second == pytest.approx((up + down - 2 * middle) / 2e-6, rel=5e-3, abs=1e-6)


def test_random_signs_estimate_the_exact_terms():
    subject = prepared(attention_net)
    grids = subject.grids("w3a3")
    sets = {name: {name: q} for name, q in grids.items()}
    exact = taylor(subject, sets, subject.batches)
    few, again, other = (taylor(subject, sets, subject.batches, draws=2, seed=s) for s in (0, 0, 1))
    assert few == again
    assert few != other
    many = taylor(subject, sets, subject.batches, draws=200)
    scale = max(abs(term.second) for term in exact.values())
    for key, term in exact.items():
        assert many[key].first == pytest.approx(term.first, rel=1e-5, abs=1e-8)
        assert many[key].second == pytest.approx(term.second, abs=0.25 * scale)
    off = [max(abs(e[k].second - exact[k].second) for k in exact) for e in (few, many)]
    assert off[1] < off[0]


def test_nothing_is_left_behind_and_batches_do_not_matter():
    subject = prepared(conv_net)
    clean = subject.losses()
    sets = {"all": subject.grids("w3a3")}
    found = taylor(subject, sets, subject.batches)["all"]
    assert torch.equal(subject.losses(), clean)
    assert not any(p.requires_grad for p in subject.model.parameters())
    whole = [(torch.cat([x for x, _ in subject.batches]), torch.cat([y for _, y in subject.batches]))]
    again = taylor(subject, sets, whole)["all"]
    assert again.total == pytest.approx(found.total, rel=1e-4)
    parts = split(whole, 16)
    assert [len(y) for _, y in parts] == [16, 16, 8]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole[0][0])
    assert AT_ONCE <= 16


def test_a_set_without_effect_has_terms_of_zero():
    subject = prepared(conv_net)
    nothing = nn.Identity()
    found = taylor(subject, {"nothing": {"0.weight": nothing}}, subject.batches)
    assert found["nothing"].total == 0
    assert taylor(subject, {}, subject.batches) == {}


@pytest.mark.parametrize("name", ["einsum", "twice", "encoder", "hf_vit_sdpa"])
@pytest.mark.parametrize("scheme", ["w3a3", "w3"])
def test_they_exist_on_any_model(name, scheme):
    """With weights only, attention stays fused, and its backward pass has to have a derivative."""
    model, example = build(name)
    subject = Subject.prepare(model, [example], [scheme])
    found = taylor(subject, {"all": subject.grids(scheme)}, subject.batches)["all"]
    assert math.isfinite(found.total)
    assert found.second != 0
