"""torch.export and torch.compile give programs that compute what the quantized model computes."""

import shutil
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

import planish
from planish.deploy.operators import visible_quantizers
from planish.models import Preprocessing
from planish.network.batches import call_model, logits_of, map_tensors
from planish.qat import QATSettings, train_quantized
from planish.qat.methods import get_method
from planish.scheme import Format, Scheme
from tests.network.zoo import build, image, tokens
from tests.training import tiny

torch.set_num_threads(1)


class Attention(nn.Module):
    """PyTorch's attention on its own, which has an inference kernel that would go past the taps."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def quantized_model(name, scheme="w4a4"):
    if name == "small_swin":
        torch.manual_seed(0)
        model = SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5)
        model, example = model.eval(), image(32)
    elif name == "attention":
        torch.manual_seed(0)
        model, example = Attention().eval(), tokens()
    else:
        model, example = build(name)
    return planish.quantize(model, [example], scheme), example


@torch.no_grad()
def run(model, example):
    return logits_of(call_model(model, example))


def export(model, example, **options):
    """With a batch of any size; 0, 1 and what the example has are sizes like others."""
    batch = torch.export.Dim("batch", max=64)
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    shapes = {"pixel_values": {0: batch}} if isinstance(example, dict) else ({0: batch},)
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, **options)


def batches(example):
    """One image and five."""
    yield map_tensors(example, lambda x: x[:1])
    yield map_tensors(example, lambda x: torch.cat([x, x.flip(0) * 0.7, x[:1] + 0.1]))


EXPORTED = ["vit_gray_28", "test_resnet", "convnext", "small_swin", "torchvision_vit", "hf_vit_sdpa", "encoder",
            "einsum", "convolutions", "twice", "beit", "attention"]  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_program_computes_the_same_for_any_batch(name):
    model, example = quantized_model(name)
    exported = export(model, example)
    for batch in batches(example):
        torch.testing.assert_close(run(exported.module(), batch), run(model, batch), rtol=1e-5, atol=1e-5)


def test_inputs_keep_their_names():
    model, example = quantized_model("vit_gray_28")
    assert export(model, example).graph_signature.user_inputs == ("x",)
    model, example = quantized_model("hf_vit_sdpa")
    assert export(model, example).graph_signature.user_inputs == ("pixel_values",)


@pytest.mark.parametrize("strict", [False, True])
def test_quantizers_stay_visible_for_any_batch(strict):
    model, example = quantized_model("torchvision_vit", "w2a4")
    with visible_quantizers(model):
        exported = export(model, example, strict=strict)
    target = torch.ops.planish.fake_quantize.default
    found = [node.args[-1] for node in exported.graph.nodes if node.target is target]
    assert sorted(found) == sorted(site.name for site, _ in model.planish_assignment.quantized())
    for batch in batches(example):
        torch.testing.assert_close(run(exported.module(), batch), run(model, batch))


SCHEMES = {
    "tokens": replace(Scheme.parse("w4a4"), activations=Format(4, "token", symmetric=False)),
    "groups": Scheme("w4a8", Format(4, "group", group_size=4), Format(8, symmetric=False)),
    "weights": "w3",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_of_grid_is_exported(scheme):
    model, example = quantized_model("gpt2", SCHEMES[scheme])
    exported = export(model, example)
    for batch in batches(example):
        torch.testing.assert_close(run(exported.module(), batch), run(model, batch))


COMPILED = ["vit_gray_28", "test_resnet", "small_swin", "torchvision_vit", "encoder", "einsum", "convolutions", "twice",
            "beit", "attention", "gpt2"]  # fmt: skip


@pytest.fixture
def fresh():
    """What was compiled before does not count."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_model_computes_the_same(name, fresh):
    model, example = quantized_model(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, example), run(model, example), rtol=1e-5, atol=1e-5)


def test_padding_masks_do_not_lead_past_the_taps(fresh):
    """The encoder nests what is padded, and runs its inference kernels, if nothing keeps it from that."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

        def forward(self, x, mask):
            return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))

    model = Padded().eval()
    example = {"x": tokens(), "mask": torch.tensor([[False] * 9, [False] * 5 + [True] * 4])}
    quantized = planish.quantize(model, [example], "w4a4")
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, example), run(quantized, example), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_computes_the_same(fresh):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    x = torch.randn(3, 1, 8, 8)
    model = planish.quantize(tiny.mlp().eval(), [x], "w4a4")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-5, atol=1e-5)


RECIPE = {
    "source": "timm", "architecture": "vit_tiny_patch16_224",
    "arguments": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1,
                  "num_classes": 4},
}  # fmt: skip


def trained_model(method):
    torch.manual_seed(0)
    model = timm.create_model(RECIPE["architecture"], **RECIPE["arguments"])
    settings = QATSettings(averaging=0.9, training=tiny.settings(epochs=1, lr=0.01))
    return train_quantized(model, tiny.loader(n=12, size=16), "w2a4", get_method(method), settings=settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "ofq"])
def test_trained_models(method, fresh):
    model, x = trained_model(method), torch.randn(3, 1, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-5, atol=1e-5)
    exported = export(model, x)
    for batch in batches(x):
        torch.testing.assert_close(run(exported.module(), batch), run(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_loaded_models(fresh, tmp_path):
    checkpoint = pytest.importorskip("planish.deploy.checkpoint")
    look = Preprocessing((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
    model, x = trained_model("ofq"), torch.randn(3, 1, 16, 16)
    checkpoint.save(model, tmp_path / "m.safetensors", recipe=RECIPE, preprocessing=look, protocol={})
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-5, atol=1e-5)
    with visible_quantizers(loaded):
        exported = export(loaded, x)
    for batch in batches(x):
        torch.testing.assert_close(run(exported.module(), batch), run(model, batch), rtol=1e-5, atol=1e-5)
