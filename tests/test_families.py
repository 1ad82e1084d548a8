"""Every architecture family of timm, small: flatten one step, ledger, rtn at w4a4, export, the answers compared."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import planish
from planish.models import Preprocessing
from tests.families import FAMILIES, build, modules

torch.set_num_threads(1)
# What `make test` runs: the families whose networks are soon exported; `pytest -m thorough` runs the others.
QUICK = [
    "beit", "byoanet-bottleneck", "byoanet-lambda", "byobnet", "cait", "convit", "convmixer", "convnext",
    "cspnet", "deepseek_vit", "deit", "densenet", "dla", "efficientformer", "efficientnet", "eva", "fasternet",
    "gemma4_vit", "inception_next", "lcnetv2", "lowformer", "mambaout", "metaformer", "mlp_mixer",
    "naflexvit", "nfnet", "pit", "qwen3_vit", "rdnet", "res2net", "resnet", "resnetv2", "selecsls",
    "sequencer", "sknet", "swin_transformer", "swin_transformer_v2", "vgg", "vision_transformer",
    "vision_transformer_relpos", "vision_transformer_sam", "xcit",
]  # fmt: skip
# The failures that remain, as docs/architectures.md lists them.
FAILING: dict[str, str] = {
    "efficientnet-conditional": "its convolutions have as many groups as there are images, and ONNX wants a number",
    "sequencer": "its LSTMs multiply inside a fused kernel that no tap can reach",
}
# Kernels that ONNX Runtime lacks, in the words of the report. Whatever else stays in float is a defect.
IN_FLOAT = (
    "a grouped convolution whose output is needed in float has no integer kernel",
    "there is no integer kernel for transposed convolutions",
    "ONNX Runtime found no integer kernel",
    "there is no integer kernel for the sum",
)
# operands that a network computes from a table of its own, on the grid of an activation
TABLES = "_operand1 has a zero point; integer kernels want symmetric weights"
# parts that the network computes and does not use, so that they are not in its file
UNUSED = ("gcvit",)


@pytest.fixture(scope="module", autouse=True)
def _one_registry():
    """The exporter reads its table of operators anew every time, which takes as long as a small network."""
    from torch.onnx._internal.exporter import _registration

    registry = getattr(_registration, "ONNXRegistry", None)
    if not hasattr(registry, "from_torchlib"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        made = registry.from_torchlib()
        patch.setattr(registry, "from_torchlib", lambda *args, **kwargs: made)
        yield


def _parameter(name):
    marks = [] if name in QUICK else [pytest.mark.thorough]
    if name in FAILING:
        marks.append(pytest.mark.xfail(strict=True, raises=planish.PlanishError, reason=FAILING[name]))
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [_parameter(name) for name in FAMILIES])
def test_flatten_ledger_quantize_export(name, tmp_path):
    model, side = build(name)
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    flat = planish.flatten(model, DataLoader(TensorDataset(images, torch.arange(4)), 4), scheme="w4a4", epochs=1)
    assert flat.state_dict().keys() == model.state_dict().keys()
    quantized = planish.quantize(flat, [images], "w4a4", "rtn")
    ledger = planish.ledger(quantized)
    assert not quantized.planish_assignment.allowed
    assert "float" not in ledger.shares
    assert sum(share for bits, share in ledger.shares.items() if bits in ("w4a4", "a4a4")) > 0.05
    looks = Preprocessing((3, side, side), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    done = planish.export(quantized, tmp_path / "m.onnx", images=[images], preprocessing=looks)
    # a sum may lie on the border between two codes, where the order of a float sum decides
    with torch.no_grad():
        logits = quantized(images)
    assert not done.agreement.beyond_ties
    assert done.agreement.largest <= 0.05 * (logits.max() - logits.min())
    floats = {form.why for form in done.in_float if not form.why.startswith(IN_FLOAT) and not form.why.endswith(TABLES)}
    assert floats == set()
    assert name in UNUSED or len(done.forms) >= len({p.module for p in quantized.planish_assignment.products})


def test_the_table_has_every_family():
    listed = {name.partition("-")[0] for name in FAMILIES}
    assert listed >= modules() - {"timm"}
    assert len({name.partition("-")[0] for name in QUICK}) >= 40
    assert set(FAILING) <= set(FAMILIES)
