"""A small network of every architecture family of timm: what to build, with which arguments, on which images.

A key is the name of timm's module, and behind a dash what sets a second entry apart. An entry names an architecture of
timm or a class of the module (``module.Class``, where the registered names take no smaller sizes), its arguments and
the side of the images.
"""

import importlib
from typing import Any

import timm
import torch
from timm.models import metaformer, mlp_mixer
from timm.models.byobnet import ByoBlockCfg
from timm.models.cspnet import CspModelCfg, CspStagesCfg, CspStemCfg
from timm.models.mvitv2 import MultiScaleVitCfg
from timm.models.regnet import RegNetCfg
from timm.models.selecsls import SelecSlsBlock
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 1, "embed_dim": 32, "mlp_ratio": 4}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}
ONES: tuple[int, ...] = (1, 1, 1, 1)
RESNET = {"layers": ONES, "channels": (16, 16, 32, 32)}
CSP = CspModelCfg(
    stem=CspStemCfg(out_chs=8, kernel_size=3, stride=1, pool=""),
    stages=CspStagesCfg(
        depth=(1, 2), out_chs=(16, 32), stride=2, expand_ratio=(2.0, 1.0), bottle_ratio=(0.5, 1.0),
        block_ratio=(1.0, 0.5), down_growth=True, block_type="dark",
    ),
)  # fmt: skip
SELECSLS = {
    "block": SelecSlsBlock, "features": [(32, 0, 16, 16, True, 2), (16, 16, 16, 32, False, 1)],
    "head": [(32, 32, 3, 2)], "num_features": 32, "feature_info": [],
}  # fmt: skip
XCEPTION = [
    {"in_chs": 64, "out_chs": 32, "stride": 2},
    {"in_chs": 32, "out_chs": (32, 32, 64), "stride": 1, "no_skip": True, "start_with_relu": False},
]
VITAMIN = VitCfg(
    embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8, conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)  # fmt: skip


def _block(kind: str, channels: int, **options: Any) -> ByoBlockCfg:
    return ByoBlockCfg(type=kind, d=1, c=channels, s=2, **{"gs": 0, "br": 0.5, **options})


def _attentive(kind: str, **options: Any) -> dict[str, Any]:
    """A residual network whose last stage is attention of some kind."""
    blocks = (_block("bottle", 32), _block("bottle", 32), _block("self_attn", 64))
    return {"blocks": blocks, "stem_chs": 8, "self_attn_layer": kind, "self_attn_kwargs": options}


def _branches(count: int, *channels: int) -> dict[str, Any]:
    """A stage of HRNet."""
    return {
        "num_modules": 1, "num_branches": count, "block_type": "BASIC", "num_blocks": (1,) * count,
        "num_channels": channels, "fuse_method": "SUM",
    }  # fmt: skip


HRNET = {
    "stem_width": 8, "stage1": {**_branches(1, 8), "block_type": "BOTTLENECK"}, "stage2": _branches(2, 8, 16),
    "stage3": _branches(3, 8, 16, 16), "stage4": _branches(4, 8, 16, 16, 16),
}  # fmt: skip

# name: (architecture or class, side of the images, arguments)
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 32, VIT),
    "byoanet-bottleneck": ("botnet26t_256", 64, {**_attentive("bottleneck"), "img_size": 64}),
    "byoanet-halo": ("halonet26t", 128, _attentive("halo", block_size=8, halo_size=2)),
    "byoanet-lambda": ("lambda_resnet26t", 64, _attentive("lambda", r=5)),
    "byobnet": ("repvgg_a0", 32, {"blocks": (_block("rep", 16), _block("rep", 32))}),
    "byobnet-mobileone": ("mobileone_s0", 32, {"stem_chs": 8, "blocks": tuple(
        _block("one", 16, gs=gs, block_kwargs={"num_conv_branches": 2}) for gs in (0, 1))}),
    "cait": ("cait_xxs24_224", 32, {**VIT, "depth_token_only": 1}),
    "coat": ("coat_tiny", 32, {
        "img_size": 32, "embed_dims": (32,) * 4, "num_heads": 8, "serial_depths": ONES, "parallel_depth": 1}),
    "convit": ("convit_tiny", 32, {**VIT, "depth": 2, "local_up_to_layer": 1}),
    "convmixer": ("convmixer.ConvMixer", 32, {"dim": 16, "depth": 2}),
    "convnext": ("convnext_atto", 32, {"depths": ONES, "dims": (8, 16, 24, 32)}),
    "convnext-v2": ("convnextv2_atto", 32, {"depths": ONES, "dims": (8, 16, 24, 32)}),
    "cpubone": ("cpubone_nano", 64, {
        "width_list": [8, 8, 16, 32, 32], "depth_list": [0, 1, 1, 1, 1], "head_widths": (64, 64)}),
    "crossvit": ("crossvit_9_240", 64, {
        "img_size": 64, "img_scale": (1.0, 1.0), "patch_size": (8, 16), "embed_dim": (16, 32), "depth": ((1, 1, 0),),
        "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)}),
    "csatv2": ("csatv2", 64, {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}),
    "cspnet": ("cspnet.CspNet", 32, {"cfg": CSP}),
    "cspnext": ("cspnext_tiny", 32, {}),
    "davit": ("davit_tiny", 32, {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2), "window_size": 4}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"img_size": 56, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, VIT),
    "densenet": ("densenet121", 32, {"growth_rate": 8, "block_config": ONES}),
    "dla": ("dla34", 32, {"levels": [1] * 6, "channels": [8, 8, 16, 16, 32, 32]}),
    "dpn": ("dpn48b", 32, {"k_sec": ONES}),
    "edgenext": ("edgenext_xx_small", 64, {"depths": (1, 1, 1, 2), "dims": (8, 16, 24, 32), "heads": (2,) * 4}),
    "efficientformer": ("efficientformer_l1", 224, {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32)}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {
        "img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (8, 16, 24, 32)}),
    "efficientnet": ("test_efficientnet", 32, {}),
    "efficientnet-conditional": ("efficientnet_cc_b0_4e", 32, {}),
    "efficientnet-mixed": ("mixnet_s", 32, {}),
    "efficientvim": ("efficientvim_m1", 64, {"embed_dim": (16, 24, 32), "depths": (1, 1, 1), "state_dim": (9, 4, 1)}),
    "efficientvit_mit": ("efficientvit_b0", 32, {
        "widths": (8, 8, 16, 16, 32), "depths": (0, 1, 1, 1, 1), "head_widths": (32, 32)}),
    "efficientvit_msra": ("efficientvit_m0", 64, {"img_size": 64, "embed_dim": (16, 32, 48), "depth": (1, 1, 1)}),
    "eva": ("eva02_tiny_patch14_224", 32, VIT),
    "fasternet": ("fasternet_t0", 32, {"embed_dim": 16, "depths": ONES, "feature_dim": 32}),
    "fastvit": ("fastvit_sa12", 64, {"layers": ONES, "embed_dims": (32,) * 4}),
    "focalnet": ("focalnet.FocalNet", 32, {"embed_dim": 16, "depths": ONES}),
    "gcvit": ("gcvit.GlobalContextVit", 64, {
        "img_size": 64, "depths": (2, 1, 1, 1), "embed_dim": 16, "num_heads": (2, 2, 2, 2)}),
    "gemma4_vit": ("gemma4_vit_167m", 32, VIT),
    "ghostnet": ("ghostnet_050", 32, {}),
    "hardcorenas": ("hardcorenas_a", 32, {}),
    "hgnet": ("hgnetv2_b0", 32, {"head_hidden_size": 64}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": ONES}),
    "hieradet_sam2": ("hieradet_small", 64, {
        "embed_dim": 16, "stages": (1, 2, 2, 1), "global_att_blocks": (4,), "global_pos_size": (4, 4),
        "window_spec": (8, 4, 4, 2)}),
    "hrnet": ("hrnet.HighResolutionNet", 64, {"cfg": HRNET}),
    "iformer": ("iformer_t", 64, {"dims": (8, 16, 24, 32), "depths": (1, 1, 3, 3), "attn_groups": (0, 0, 1, 1)}),
    "inception_next": ("inception_next_atto", 32, {"depths": ONES, "dims": (16, 16, 32, 32)}),
    "inception_resnet_v2": ("inception_resnet_v2", 80, {}),
    "inception_v3": ("inception_v3", 80, {}),
    "inception_v4": ("inception_v4", 80, {}),
    "lcnetv2": ("lcnetv2_small", 32, {"scale": 0.25, "depths": ONES, "head_hidden_size": 64}),
    "levit": ("levit_128s", 64, {
        "img_size": 64, "embed_dim": (16, 32, 48), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)}),
    "lowformer": ("lowformer_b0", 64, {
        "width_list": [8, 8, 16, 32, 32], "depth_list": [0, 1, 1, 1, 1], "head_widths": (64, 64)}),
    "mambaout": ("test_mambaout", 32, {}),
    "maxxvit": ("test_maxvit", 64, {"img_size": 64}),
    "maxxvit-coatnet": ("test_coatnet", 64, {"img_size": 64}),
    "metaformer": ("metaformer.MetaFormer", 64, {
        "depths": ONES, "dims": (8, 16, 32, 32),
        "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2}),
    "mlp_mixer": ("mlp_mixer.MlpMixer", 32, {**MIXER, "mlp_ratio": (0.5, 4.0)}),
    "mlp_mixer-gated": ("mlp_mixer.MlpMixer", 32, {
        **MIXER, "block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": mlp_mixer.GatedMlp}),
    "mlp_mixer-residual": ("mlp_mixer.MlpMixer", 32, {
        **MIXER, "block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine}),
    "mobilenetv3": ("lcnet_035", 32, {}),
    "mobilenetv3-v4": ("mobilenetv4_conv_small_035", 32, {}),
    "mobilenetv5": ("mobilenetv5_300m", 64, {"channel_multiplier": 0.05}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mobilevit-v2": ("mobilevitv2_050", 64, {}),
    "mvitv2": ("mvitv2.MultiScaleVit", 64, {
        "img_size": (64, 64),
        "cfg": MultiScaleVitCfg(embed_dim=(16, 16, 32, 32), depths=ONES, num_heads=(1, 1, 2, 2))}),
    "naflexvit": ("naflexvit_base_patch16_gap", 32, {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    "nasnet": ("nasnet.NASNetALarge", 64, {"stem_size": 8, "channel_multiplier": 2, "num_features": 192}),
    "nest": ("nest.Nest", 64, {"img_size": 64, "embed_dims": (16, 16, 32), "num_heads": (2,) * 3, "depths": (1,) * 3}),
    "nextvit": ("nextvit_small", 64, {"depths": (1, 1, 5, 1), "stem_chs": (16, 8, 16)}),
    "nfnet": ("test_nfnet", 32, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 8)}),
    "pnasnet": ("pnasnet5large", 64, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {"depths": ONES, "embed_dims": (8, 16, 32, 32), "num_heads": (1, 1, 2, 2)}),
    "qwen3_vit": ("qwen3_vit_88m", 32, VIT),
    "rdnet": ("rdnet_tiny", 64, {
        "growth_rates": (16,) * 3, "num_blocks_list": (1,) * 3, "block_type": ("Block", "Block", "BlockESE"),
        "is_downsample_block": (None, True, True), "num_init_features": 16}),
    "regnet": ("regnet.RegNet", 32, {
        "cfg": RegNetCfg(w0=8, wa=8.0, wm=1.6, group_size=8, depth=4, se_ratio=0.25, stem_width=8)}),
    "repghost": ("repghostnet_050", 32, {}),
    "repvit": ("repvit_m0_9", 32, {"embed_dim": (8, 16, 24, 32), "depth": ONES}),
    "res2net": ("res2net50_48w_2s", 32, {**RESNET, "base_width": 16, "stem_width": 8}),
    "resnest": ("resnest14d", 32, {**RESNET, "stem_width": 8}),
    "resnet": ("resnet10t", 32, {"channels": (16, 16, 32, 32)}),
    "resnetv2": ("resnetv2.ResNetV2", 64, {"layers": ONES, "channels": (128,) * 4, "stem_chs": 32}),
    "rexnet": ("rexnet_100", 32, {"width_mult": 0.25}),
    "selecsls": ("selecsls.SelecSls", 64, {"cfg": SELECSLS}),
    "senet": ("legacy_seresnet18", 32, {"layers": ONES}),
    "sequencer": ("sequencer2d_s", 32, {
        "layers": ONES, "embed_dims": (16,) * 4, "hidden_sizes": (8,) * 4}),
    "shvit": ("shvit_s1", 64, {
        "embed_dim": (32, 48, 64), "partial_dim": (16,) * 3, "qk_dim": (8,) * 3, "depth": (1,) * 3}),
    "sknet": ("skresnet18", 32, RESNET),
    "starnet": ("starnet_s050", 32, {}),
    "swiftformer": ("swiftformer_xs", 64, {"layers": ONES, "embed_dims": (8, 16, 24, 32)}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 32, SWIN),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 32, SWIN),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 32, SWIN),
    "tiny_vit": ("tiny_vit_5m_224", 64, {
        "embed_dims": (8, 16, 24, 32), "depths": ONES, "num_heads": ONES, "window_sizes": (4, 4, 4, 2)}),
    "tnt": ("tnt_s_patch16_224", 32, {
        "img_size": 32, "patch_size": 16, "embed_dim": 32, "inner_dim": 16, "depth": 1, "num_heads_inner": 2,
        "num_heads_outer": 2}),
    "tresnet": ("tresnet_m", 64, {"layers": ONES, "width_factor": 0.25}),
    "twins": ("twins_svt_small", 64, {
        "img_size": 64, "depths": ONES, "embed_dims": (16, 16, 16, 32), "num_heads": (1, 1, 2, 2), "wss": (4,) * 4}),
    "vgg": ("vgg.VGG", 64, {"cfg": [8, "M", 16, "M", 16, "M", 32, "M", "M"], "mlp_ratio": 0.01}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2}),
    "vision_transformer": ("vit_tiny_patch16_224", 32, VIT),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {
        "img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", 32, VIT),
    "vision_transformer_sam": ("samvit_base_patch16_224", 32, {**VIT, "global_attn_indexes": (), "window_size": 2}),
    "vitamin": ("vitamin_small_224", 64, {
        "img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "embed_cfg": VITAMIN}),
    "volo": ("volo.VOLO", 64, {"img_size": 64, "layers": ONES, "embed_dims": (16, 32, 32, 32), "num_heads": (2,) * 4}),
    "vovnet": ("ese_vovnet19b_slim_dw", 32, {}),
    "xception": ("legacy_xception", 64, {}),
    "xception_aligned": ("xception_aligned.XceptionAligned", 64, {"block_cfg": XCEPTION}),
    "xcit": ("xcit_nano_12_p16_224", 32, VIT),
}  # fmt: skip


def modules() -> set[str]:
    """The names of timm's modules that register a classifier."""
    entrypoints = (timm.model_entrypoint(name) for name in timm.list_models())
    return {entrypoint.__module__.rpartition(".")[2] for entrypoint in entrypoints}


def build(key: str, classes: int = 10) -> tuple[nn.Module, int]:
    """The network of a family in evaluation mode, with the same weights every time, and the side of its images.

    Scales, biases and tokens that begin at or near a constant get some spread, so that they count.
    """
    name, side, options = FAMILIES[key]
    torch.manual_seed(0)
    module, _, cls = name.partition(".")
    if cls:
        made = getattr(importlib.import_module(f"timm.models.{module}"), cls)(num_classes=classes, **options)
    else:
        made = timm.create_model(name, num_classes=classes, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.numel() == 1 or parameter.std() < 1e-3:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return made.eval(), side
