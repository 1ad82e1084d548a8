"""Filter-normalized lines and planes through the landscape."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.flatness.landscape import directions, filter_normalized, landscape_line, landscape_plane
from planish.flatness.perturbations import gaussians, weights_of
from planish.flatness.subject import Subject
from tests.flatness.dense import dense_loss, mlp, plain, subject_of
from tests.flatness.networks import attention_net, conv_net, images


@pytest.fixture(params=[conv_net, attention_net])
def model(request) -> nn.Module:
    return request.param()


def test_filters_of_a_direction_have_the_norms_of_the_weight():
    torch.manual_seed(0)
    w, d = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    w[2] = 0
    for axis in (0, 1, -3):
        found = filter_normalized(d, w, axis)
        for i in range(w.shape[axis]):
            got, wanted, drawn = (x.select(axis, i) for x in (found, w, d))
            assert got.norm().item() == pytest.approx(wanted.norm().item(), abs=1e-6)
            torch.testing.assert_close(got * drawn.norm(), drawn * wanted.norm())
    whole = filter_normalized(d, w, None)
    torch.testing.assert_close(whole, d * w.norm() / d.norm())
    torch.testing.assert_close(filter_normalized(d[:, 0, 0, 0], w[:, 0, 0, 0], 0).abs(), w[:, 0, 0, 0].abs())
    assert not filter_normalized(d, w, 0)[2].any()


def test_only_weights_of_products_move_and_each_by_its_own_filters(model):
    subject = subject_of(model)
    weights, found = weights_of(subject), directions(subject, 0, 0)
    assert list(found) == [site.name for site in subject.sites if site.is_weight]
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))


def test_the_line_is_that_of_a_plain_loop(model):
    subject = subject_of(model)
    network, names = plain(subject)
    ts = [-0.7, 0.0, 0.4]
    found = landscape_line(subject, ts, draws=3, seed=2)
    losses = torch.zeros(3, len(ts))
    for draw in range(3):
        drawn = gaussians(weights_of(subject), 2, draw)
        for i, t in enumerate(ts):
            parameters = dict(network.named_parameters())
            for name, path in names.items():
                w, d = parameters[path].detach(), drawn[name]
                filters = [d[k] / d[k].norm() * w[k].norm() for k in range(len(w))]
                parameters[path] = w + t * torch.stack(filters)
            losses[draw, i] = dense_loss(network, parameters, subject.batches).item()
    for i, point in enumerate(found):
        assert point.t == ts[i]
        assert point.loss == pytest.approx(losses[:, i].mean().item(), rel=1e-4)
        assert point.error == pytest.approx(losses[:, i].std().item() / math.sqrt(3), rel=1e-2, abs=1e-6)
    assert found[1].loss == pytest.approx(subject.losses().mean().item(), rel=1e-6)


def test_the_plane_holds_the_line(model):
    subject = subject_of(model)
    plane = landscape_plane(subject, points=3, span=0.5, seed=4)
    assert plane.a == plane.b == [-0.5, 0.0, 0.5]
    line = landscape_line(subject, plane.a, draws=1, seed=4)
    assert [row[1] for row in plane.loss] == pytest.approx([point.loss for point in line], rel=1e-6)
    assert math.isnan(line[0].error)
    assert plane.loss[1][1] == pytest.approx(subject.losses().mean().item(), rel=1e-6)
    both = landscape_line(subject, [0.0, 0.5], draws=2, seed=4)
    assert both[1].loss == pytest.approx((plane.loss[2][1] + plane.loss[1][2]) / 2, rel=1e-5)


def test_scales_that_layers_trade_do_not_matter():
    lines = [
        landscape_line(Subject.prepare(mlp(scale), images(mlp()), ["w4a4"]), [0.5, 1.0], draws=2)
        for scale in (1.0, 8.0)
    ]
    for one, other in zip(*lines, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_two_networks_are_looked_at_along_the_same_direction():
    first, second = (Subject.prepare(conv_net(seed), images(conv_net()), ["w4a4"]) for seed in (0, 1))
    for (name, one), other in zip(directions(first, 0, 0).items(), directions(second, 0, 0).values(), strict=True):
        rows = [torch.nn.functional.normalize(x.flatten(1), dim=1) for x in (one, other)]
        torch.testing.assert_close(rows[0], rows[1], msg=name)
        assert not torch.equal(one, other)


def test_the_seed_decides(model):
    subject = subject_of(model)
    assert landscape_line(subject, [0.5]) == landscape_line(subject, [0.5])
    assert landscape_line(subject, [0.5], seed=1) != landscape_line(subject, [0.5])
    assert landscape_plane(subject, 2, images=8) == landscape_plane(subject, 2, images=8)


def test_errors(model):
    subject = subject_of(model)
    with pytest.raises(PlanishError, match="1 direction or more"):
        landscape_line(subject, draws=0)
    for points, span in ((1, 1.0), (3, 0.0)):
        with pytest.raises(PlanishError, match="2 points a side"):
            landscape_plane(subject, points, span)
