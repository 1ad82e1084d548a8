"""Modes and statistics come back."""

import pytest
import torch
from torch import nn

from planish.network.modes import evaluating, frozen_statistics


def test_evaluating_gives_every_module_its_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())).train()
    model[1][0].eval()
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.zeros(2, 7))  # also when the model does not run
    assert [m.training for m in model.modules()] == modes
    assert any(modes)


def test_frozen_statistics():
    model, x = (
        nn.Sequential(nn.BatchNorm1d(3, momentum=0.2), nn.BatchNorm1d(3, momentum=None)).train(),
        torch.randn(9, 3),
    )
    plain = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with frozen_statistics(model):
        torch.testing.assert_close(model(3 + x), plain)  # still normalized by the batch
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.momentum for m in model] == [0.2, None]
    model(3 + x)
    assert int(model[0].num_batches_tracked) == 2
