"""The same answers from a quantized network, its integers, its file and ONNX Runtime."""

import torch

from planish.deploy.checkpoint import load, save
from planish.deploy.integers import integer_model, integer_report
from planish.deploy.onnx.export import export
from planish.models import Preprocessing
from tests.ptq.test_repq import ARGUMENTS, X

LOOK = Preprocessing((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
RECIPE = {"source": "timm", "architecture": "vit_tiny_patch16_224", "arguments": ARGUMENTS}


def same_answers(quantized, folder):
    """Hold them to each other, everything in integers; gives the network of the file, and what export says."""
    with torch.no_grad():
        expected = quantized(X)
        integers = integer_model(quantized)
        torch.testing.assert_close(integers(X), expected, rtol=1e-4, atol=1e-4)
    assert not integer_report(integers).in_float
    save(quantized, folder / "q.safetensors", recipe=RECIPE, preprocessing=LOOK)
    loaded = load(folder / "q.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(X), expected)
    exported = export(quantized, folder / "q.onnx", images=[X], preprocessing=LOOK)
    assert not exported.in_float
    assert exported.agreement.largest < 1e-4
    return loaded, exported
