"""What a timm model expects of its input images."""

from __future__ import annotations

from typing import Any

from planish.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocessing_from

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "preprocessing_from", "timm_preprocessing"]


def timm_preprocessing(model: Any) -> Preprocessing:
    """The preprocessing that a timm model's ``pretrained_cfg`` asks for (`timm.data.resolve_data_config`).

    A model built with another number of input channels or another image size than its pretrained weights is met
    where timm records it: grey input gets the mean of the three channels' mean and std.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    channels, height, width = config["input_size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if (built_for := getattr(getattr(model, "patch_embed", None), "img_size", None)) is not None:
        height, width = built_for
    actual = next((p.shape[1] for p in model.parameters() if p.dim() == 4), channels)
    if actual == 1 and channels == 3:
        channels, mean, std = 1, (sum(mean) / 3,), (sum(std) / 3,)
    return Preprocessing(
        (channels, height, width), mean, std, config["interpolation"], config["crop_pct"], config["crop_mode"]
    )
