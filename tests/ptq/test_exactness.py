"""Changes that must not change the outputs: told apart in float64, on a copy."""

import copy

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import assign, attach, watch
from planish.ptq.exactness import IMAGES, check_exact, exact_ones, few_images, relative_change, require_float
from planish.ptq.passes import Calibration


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).requires_grad_(False)


def rescale(factor):
    """A change that is exact if the factor is 1: one layer times 3, the next divided by it."""

    def change(model, images):
        assert images.dtype == torch.float64
        assert len(images) == IMAGES
        model[0].weight.mul_(3)
        model[0].bias.mul_(3)
        model[2].weight.mul_(factor / 3)

    return change


def test_an_exact_change_passes_and_the_model_is_untouched():
    model, before = network(), network().state_dict()
    check_exact(model, rescale(1.0), torch.randn(9, 5), "rescaling")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("factor", [1.00002, 0.5, float("nan")])
def test_one_that_is_nearly_exact_does_not(factor):
    with pytest.raises(PlanishError, match=r"^rescaling changes the outputs by .* of the largest logit"):
        check_exact(network(), rescale(factor), torch.randn(9, 5), "rescaling")


def test_a_network_that_insists_on_float32():
    class Single(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    with pytest.raises(PlanishError, match="rescaling cannot be checked, because the network does not run in float64"):
        check_exact(nn.Sequential(Single(5, 3)), lambda model, images: None, torch.randn(9, 5), "rescaling")


def shift(model, changes):
    """Odd numbers change a bias."""
    for path, number in changes.items():
        model.get_submodule(path).bias.add_(number % 2)


def test_changes_that_are_exact_are_found_one_by_one():
    model, x = network(), torch.randn(9, 5)
    before = copy.deepcopy(model.state_dict())
    assert exact_ones(model, {"0": 2, "2": 4}, shift, x, "moving") == ({"0": 2, "2": 4}, [])
    kept, said = exact_ones(model, {"0": 2, "2": 3}, shift, x, "moving")
    assert kept == {"0": 2}
    assert len(said) == 1
    assert said[0].startswith("moving 2 changes the outputs by ")
    assert exact_ones(model, {}, shift, x, "moving") == ({}, [])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_changes_that_are_exact_alone_and_not_together():
    def double(model, changes):
        if len(changes) == 2:
            model[0].weight.mul_(2)

    kept, said = exact_ones(network(), {"0": 1, "2": 1}, double, torch.randn(9, 5), "moving")
    assert kept == {}
    assert [text[:39] for text in said] == ["moving 0, 2 together changes the output"]


def test_a_change_after_which_the_network_does_not_run():
    def widen(model, images):
        model[0] = nn.Linear(5, 8).double()

    with pytest.raises(PlanishError, match=r"widening leaves a network that does not run, so it is left out: .*mat1"):
        check_exact(network(), widen, torch.randn(9, 5), "widening")


def test_whatever_a_changed_model_raises_is_told():
    class Picky(nn.Linear):
        def forward(self, x):
            left, right = x.split(4, -1)
            return super().forward(torch.cat([left, right], -1))

    def widen(model, images):
        model[0] = nn.Linear(5, 12).double()

    model = nn.Sequential(nn.Linear(5, 7), Picky(7, 3))
    with pytest.raises(PlanishError, match="does not run, so it is left out: too many values to unpack"):
        check_exact(model, widen, torch.randn(9, 5), "widening")


def test_a_network_that_cannot_be_checked_is_told_once():
    class Single(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    kept, said = exact_ones(nn.Sequential(Single(5, 3)), {"0": 2, "1": 2}, shift, torch.randn(9, 5), "moving")
    assert kept == {}
    assert len(said) == 1
    assert said[0].startswith("moving 0 and 1 more cannot be checked")


def test_relative_change():
    assert relative_change(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25
    assert relative_change(torch.zeros(2), torch.zeros(2)) == 0


def test_few_images_of_any_kind_of_batch():
    x = torch.randn(9, 5)
    assert len(few_images(x)) == IMAGES
    assert len(few_images({"x": x})["x"]) == IMAGES
    assert len(few_images((x, x))[1]) == IMAGES


def test_taps_are_refused():
    model, x = network(), torch.randn(9, 5)
    work = Calibration(model, [x], assign(watch(model, x[:1]), "w4a4"), [model(x)])
    require_float(work, "rotate")
    attach(model, work.assignment.products, lambda site: nn.Identity())
    with pytest.raises(PlanishError, match="rotate changes the network in float: put it before the passes"):
        require_float(work, "rotate")
