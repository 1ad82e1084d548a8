"""Small models of many kinds, with random weights: (model, example) by name."""

from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)
Built = tuple[nn.Module, Any]


class Convolutions(nn.Module):
    """Every kind of convolution: plain, grouped, depthwise, strided, transposed, one-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.line = nn.Conv1d(6, 4, 3, dilation=2)
        self.up_line = nn.ConvTranspose1d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.grouped(self.stem(x)).relu())
        x = self.up_line(self.line(self.up(x).flatten(2)))
        return self.head(x.mean(-1))


class Einsum(nn.Module):
    """Attention by einsum, matmul, bmm and baddbmm, with a projection that is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8) / 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)[..., :1].expand(-1, 16, 8)
        x = x + torch.arange(16.0).to(x).view(16, 1) / 16
        q, k, v = torch.einsum("bnd,ode->obne", x, self.w)
        weights = torch.einsum("bne,bme->bnm", [q, k]).softmax(-1)
        x = weights @ v + torch.bmm(weights, v)
        x = torch.baddbmm(x, weights, v, alpha=0.5)
        return self.head(x.mean(1))


class Twice(nn.Module):
    """One layer called twice, and one parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(48, 48)
        self.tied = nn.Linear(48, 48)
        self.tied.weight = self.body.weight
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(self.tied(self.body(self.body(x).relu()).relu()))


class Encoder(nn.Module):
    """PyTorch's own transformer layers, whose inference fast path must not go past the taps."""

    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


class GPT2Block(nn.Module):
    """Hugging Face's Conv1D: ``addmm(bias, x, weight)`` with the weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(32, 16), Conv1D(16, 32)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).relu()).mean(1))


def image(side: int, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


def _timm(name: str, side: int, channels: int = 3, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        return timm.create_model(name, num_classes=5, in_chans=channels, **options), image(side, channels)

    return build


def _hugging_face(attention: str) -> Callable[[], Built]:
    def build() -> Built:
        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=8, num_labels=5, attn_implementation=attention,
        )  # fmt: skip
        return ViTForImageClassification(config), {"pixel_values": image(32)}

    return build


def _vit() -> Built:
    return VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5), image(32)


def _swin() -> Built:
    model = SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5)
    return model, image(32)


_SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
BUILDERS: dict[str, Callable[[], Built]] = {
    "convolutions": lambda: (Convolutions(), image(16)),
    "einsum": lambda: (Einsum(), image(4)),
    "twice": lambda: (Twice(), image(4)),
    "encoder": lambda: (Encoder(), tokens()),
    "gpt2": lambda: (GPT2Block(), tokens()),
    "torchvision_vit": _vit,
    "torchvision_swin": _swin,
    "hf_vit_sdpa": _hugging_face("sdpa"),
    "hf_vit_eager": _hugging_face("eager"),
    "vit_gray_28": _timm("vit_tiny_patch16_224", 28, 1, img_size=28, patch_size=7, **_SMALL),
    "deit": _timm("deit_tiny_distilled_patch16_224", 32, img_size=32, patch_size=8, **_SMALL),
    "swin": _timm(
        "swin_tiny_patch4_window7_224", 32, img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    ),
    "beit": _timm("beit_base_patch16_224", 32, img_size=32, patch_size=8, **_SMALL),
    "eva": _timm("eva02_tiny_patch14_224", 32, img_size=32, patch_size=8, **_SMALL),
    "test_vit": _timm("test_vit", 160),
    "test_convnext": _timm("test_convnext", 64),
    "test_efficientnet": _timm("test_efficientnet", 64),
    "test_resnet": _timm("test_resnet", 64),
    "test_nfnet": _timm("test_nfnet", 64),
    "mobilenetv3": _timm("mobilenetv3_small_050", 32),
    "convnext": _timm("convnext_atto", 32, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
}
NAMES = sorted(BUILDERS)


@cache
def _prototype(name: str) -> Built:
    torch.manual_seed(0)
    model, example = BUILDERS[name]()
    with torch.no_grad():  # layer scales, position embeddings and class tokens start at or near zero: make them count
        for parameter in model.parameters():
            if parameter.std() < 1e-3 or parameter.numel() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval(), example


def build(name: str) -> Built:
    """A fresh copy of the model, in evaluation mode, and an example of two images."""
    from copy import deepcopy

    model, example = _prototype(name)
    return deepcopy(model), example
