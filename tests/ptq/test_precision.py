"""Products in bfloat16 while a pass learns, and only then."""

import pytest
import torch

from planish.errors import PlanishError
from planish.ptq import Calibrate, FoldBatchNorm, Reconstruct, Round, quantize
from planish.ptq.norm_tuning import PrepareNorms, TuneNorms
from planish.ptq.precision import products_in
from tests.ptq.work import images
from tests.training import tiny

torch.set_num_threads(1)
BASE = [FoldBatchNorm(), Calibrate(), Round()]
LEARNERS = {
    "reconstruction": lambda **o: [*BASE, Reconstruct(iterations=3, batch=4, **o)],
    "tuning": lambda **o: [*BASE, TuneNorms(layers="all", steps=3, batch=4, **o)],
    "preparation": lambda **o: [PrepareNorms(steps=3, batch=4, **o), *BASE],
}  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """The precision of every linear layer that was run, with and without gradients."""
    found = {True: set(), False: set()}
    plain = torch.nn.functional.linear

    def linear(x, *args, **kwargs):
        found[torch.is_grad_enabled()].add(torch.get_float32_matmul_precision())
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return found


@pytest.mark.parametrize("name", LEARNERS)
def test_it_is_lower_where_something_is_learned_and_nowhere_else(name, seen):
    before = torch.get_float32_matmul_precision()
    quantize(tiny.vit().eval(), [images(size=16)], "w4a4", LEARNERS[name](precision="bfloat16"))
    assert "medium" in seen[True]
    assert seen[False] == {before}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("name", LEARNERS)
def test_it_is_left_alone_by_default(name, seen):
    before = torch.get_float32_matmul_precision()
    quantize(tiny.vit().eval(), [images(size=16)], "w4a4", LEARNERS[name]())
    assert seen == {True: {before}, False: {before}}


def test_it_comes_back_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), products_in("bfloat16"):
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("make", [lambda p: TuneNorms(precision=p), lambda p: LEARNERS["reconstruction"](precision=p)])
def test_an_unknown_one_is_refused(make):
    with pytest.raises(PlanishError, match="precision is 'half': choose one of float32, bfloat16"):
        quantize(tiny.conv().eval(), [images()], "w4a4", make("half"))
