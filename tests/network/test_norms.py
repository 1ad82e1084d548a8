"""Re-estimated BatchNorm statistics are plain averages over the batches; everything else stays."""

import copy

import pytest
import torch
from torch import nn

from planish.network import reestimate_batchnorm
from tests.network.zoo import build


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.01, momentum=0.3), nn.Dropout(0.5))


def batches(count=3):
    return list(torch.randn(count, 8, 3, 6, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("training", [True, False])
def test_averages_by_hand(training):
    model = net().train(training)
    with torch.no_grad():
        seen = [model[0](x).transpose(0, 1).flatten(1) for x in batches()]
    assert reestimate_batchnorm(model, iter(batches())) == 3
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean(1) for y in seen]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var(1) for y in seen]).mean(0))
    assert (model[1].eps, model[1].momentum, int(model[1].num_batches_tracked)) == (0.01, 0.3, 3)
    assert all(m.training == training for m in model.modules())


def test_later_norms_see_what_training_mode_puts_out():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    x = 5 + 3 * torch.randn(64, 3)
    reestimate_batchnorm(model, [x])
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    assert model[1].running_mean.abs().max() < 1e-5


def test_a_frozen_norm_in_a_model_in_training_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    model[0].eval()
    frozen = copy.deepcopy(model[0].state_dict())
    assert reestimate_batchnorm(model, batches()) == 3
    assert all(torch.equal(value, frozen[key]) for key, value in model[0].state_dict().items())
    assert int(model[1].num_batches_tracked) == 3
    assert [m.training for m in model] == [False, True]


def state_after(model, feed):
    before = copy.deepcopy(model.state_dict())
    used = reestimate_batchnorm(model, feed)
    return used, all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_batches_change_nothing():
    model = net()
    model(batches()[0])
    assert state_after(model, []) == (0, True)


def test_a_model_without_batchnorm_is_not_run():
    def never():
        raise AssertionError("the batches were read")
        yield

    assert state_after(build("vit_gray_28")[0], never()) == (0, True)
    assert state_after(nn.BatchNorm2d(3, track_running_stats=False), never()) == (0, True)


def test_an_error_on_the_way_leaves_the_old_statistics():
    model = net()
    model(batches()[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [batches()[0], torch.zeros(2, 5, 6, 6)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[1].momentum == 0.3


def test_a_real_network():
    model, example = build("test_resnet")
    before = copy.deepcopy(model)
    assert reestimate_batchnorm(model, [example, example]) == 2
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {key.rpartition(".")[0] for key in changed} == norms
    assert not model.training
