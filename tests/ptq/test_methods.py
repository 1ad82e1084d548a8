"""The list of methods, each of which is a list of passes."""

import pytest
import torch

from planish.errors import PlanishError
from planish.ptq import METHODS, Calibrate, Reconstruct, Round, get_method, quantize, with_settings
from tests.ptq.test_reconstruction import images
from tests.training import tiny


@pytest.mark.parametrize("name", METHODS)
def test_every_method_quantizes(name):
    passes = with_settings(METHODS[name].passes(), iterations=2, batch=4)
    quantized = quantize(tiny.conv().eval(), images(), "w4a4", passes)
    assert quantized.planish_assignment.scheme.name == "w4a4"
    assert METHODS[name].summary
    assert METHODS[name].paper


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_work_in_place_give_the_same(name):
    torch.manual_seed(1)
    batches = [4 * torch.randn(6, 1, 8, 8) for _ in range(2)]
    passes = with_settings(METHODS[name].passes(), iterations=3, batch=4)
    usual, ours = (quantize(tiny.InPlace(inplace).eval(), batches, "w3a3", passes) for inplace in (False, True))
    for key, value in usual.state_dict().items():
        torch.testing.assert_close(
            ours.state_dict()[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_a_list_is_made_anew():
    assert get_method("rtn").passes() is not get_method("rtn").passes()


def test_settings_reach_the_passes_that_have_them():
    given = [Calibrate(), Round(), Reconstruct(drop=0.25)]
    changed = with_settings(given, iterations=7, seed=3, memory=None, nobody=1)
    assert changed[:2] == given[:2]
    assert changed[2] == Reconstruct(drop=0.25, iterations=7, seed=3)
    assert given[2] == Reconstruct(drop=0.25)


def test_an_unknown_name_is_refused():
    with pytest.raises(PlanishError, match=r"method 'best' is not known: choose one of rtn, matched, gptq"):
        get_method("best")
