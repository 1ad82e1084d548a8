"""What norm tuning trains, and where it goes afterwards."""

import torch
from torch import nn

from planish.functional import quantize as codes_of
from planish.ptq import Calibrate, FoldBatchNorm, Round
from planish.ptq.affines import Affines, norm_parameters
from planish.ptq.outputs import layers_of
from tests.network.zoo import build
from tests.ptq.work import network, same, state, work

RTN = (FoldBatchNorm(), Calibrate(), Round())


def affines_of(calibration):
    return Affines(norm_parameters(calibration.model), layers_of(calibration))


def test_norms_are_found_by_name():
    model, _ = build("vit_gray_28")
    names = list(norm_parameters(model))
    assert names[:2] == ["blocks.0.norm1.weight", "blocks.0.norm1.bias"]
    assert len(names) == 2 * sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert not any(name.startswith("blocks.1.norm2") for name in norm_parameters(model, but=["blocks.1.norm2"]))
    assert list(norm_parameters(nn.LayerNorm(4))) == ["weight", "bias"]
    assert norm_parameters(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))) == {}


@torch.no_grad()
def test_nothing_changes_until_they_are_trained():
    model, batches = network("vit")
    calibration = work(model, batches, passes=RTN)
    affines, expected = affines_of(calibration), calibration.model(batches[0])
    with affines.applied():
        torch.testing.assert_close(calibration.model(batches[0]), expected)
        assert all(parameter.requires_grad for parameter in affines.parameters())
    assert not any(parameter.requires_grad for parameter in calibration.model.parameters())
    assert not any(module._forward_hooks for module in calibration.model.modules())


@torch.no_grad()
def test_baked_they_compute_the_same_with_the_same_integers():
    model, batches = network("separable")
    calibration = work(model, batches, "w3a4", RTN)
    affines, layers = affines_of(calibration), layers_of(calibration)
    integers = [codes_of(layer.module._parameters["weight"], layer.tap.grid) for layer in layers]
    torch.manual_seed(1)
    for parameter in affines.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    with affines.applied():
        expected = calibration.model(batches[0])
    affines.bake()
    torch.testing.assert_close(calibration.model(batches[0]), expected, atol=1e-3, rtol=1e-3)
    for layer, before in zip(layers, integers, strict=True):
        assert torch.equal(codes_of(layer.module._parameters["weight"], layer.tap.grid), before)


def test_put_back():
    model, batches = network("vit")
    calibration = work(model, batches, passes=RTN)
    affines, before = affines_of(calibration), state(calibration.model)
    values = affines.values()
    with torch.no_grad():
        for parameter in affines.parameters():
            parameter.add_(1)
    assert not same(state(calibration.model), before)
    affines.put(values)
    assert same(state(calibration.model), before)
