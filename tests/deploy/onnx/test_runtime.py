"""What ONNX Runtime is asked about a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from planish.deploy.onnx.runtime import Agreement, compare, open_session, some_images
from planish.errors import PlanishError


class Session:
    """Gives prepared logits."""

    def __init__(self, logits):
        self.logits = np.asarray(logits, np.float32)

    def run(self, _, feeds):
        return [self.logits[: len(feeds["images"])]]


def test_images_with_another_first_class_are_listed_with_their_margin():
    images = torch.tensor([[3.0, 1.0], [0.0, 0.5], [2.0, 1.9995]])
    found = compare(nn.Identity(), Session([[3, 1], [0.6, 0.5], [2, 2.1]]), [images])
    assert [index for index, _ in found.differing] == [1, 2]
    assert [margin for _, margin in found.differing] == pytest.approx([0.5, 0.0005], abs=1e-6)
    assert found.largest == pytest.approx(0.6)
    assert found.top1 == pytest.approx(1 / 3)
    assert [index for index, _ in found.beyond_ties] == [1]
    batches = compare(nn.Identity(), Session([[3, 1]]), [(images[:1], 0), (images[2:], 0)])
    assert (batches.images, batches.differing) == (2, ())


def test_logits_that_are_not_finite_are_not_hidden():
    found = compare(nn.Identity(), Session([[np.nan, 1.0]]), [torch.tensor([[3.0, 1.0]])])
    assert found.largest == np.inf
    same = compare(nn.Identity(), Session([[np.inf, 1.0]]), [torch.tensor([[np.inf, 1.0]])])
    assert same.largest == 0


def test_nothing_to_compare_on_and_files_that_are_none(tmp_path):
    with pytest.raises(PlanishError, match="there are no images to compare"):
        compare(nn.Identity(), Session([]), [])
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(PlanishError, match="does not take the graph") as caught:
        open_session(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_random_images_are_the_same_every_time():
    assert torch.equal(some_images((1, 2, 3))[0], some_images((1, 2, 3))[0])
    assert Agreement(0, (), 0.0).top1 == 1
