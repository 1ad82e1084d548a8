"""The settings of a run: the one source of the command line's options and of config.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from tyro.conf import arg

T = TypeVar("T")
OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True)
class ModelOptions:
    """Which network, which images."""

    model: str = "vit"
    """vit or convnet (embedded), a timm name, hf:NAME or a folder that save_pretrained wrote (Hugging Face),
    torchvision:NAME (torchvision:NAME:DEFAULT fetches published weights), or file.py:function"""
    weights: OptionalPath = None
    """safetensors or torch state_dict to load into the model"""
    data: OptionalPath = None
    """folder of class folders, or of train/ and val/ with class folders; a CSV file with path and label; tar shards; a
    data set of Hugging Face datasets, saved or hf:NAME; default: the embedded Fashion-MNIST images"""
    batch_size: int = 128
    """images in a batch, of all processes together"""
    workers: int = 0
    """processes that decode images"""
    threads: int = 0
    """CPU threads; 0: as many as cores are free"""
    seed: int = 0
    """of everything random"""


@dataclass(frozen=True)
class TrainOptions:
    """How an arm is trained; every arm has the same budget."""

    epochs: int = 6
    """passes over the training images, for every trained arm"""
    lr: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """peak learning rate; default: 0.02 with SGD (BatchNorm and no LayerNorm), 5e-4 with AdamW (other networks)"""
    optimizer: str = "auto"
    """auto, sgd or adamw"""
    weight_decay: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """on weights, not on biases and norms; default: 5e-4 with SGD, 0.05 with AdamW"""
    warmup: float = 0.05
    """share of the training in which the learning rate rises to its peak; it falls again by a cosine"""
    final_lr: float = 0.0
    """what the learning rate ends at, as a share of its peak"""
    mixed_precision: str = "no"
    """no, bf16 or fp16"""
    accumulation: int = 1
    """parts in which a batch is computed, one after the other: less memory, the same step"""
    compile: bool = False
    """let torch.compile have the network in training"""


@dataclass(frozen=True)
class NoiseOptions:
    """What the flat arm differs in; the defaults are the measured best (docs/flattening.md)."""

    weight_noise: str = "residual"
    """none, iid, differential, differential-forward, uniform or residual"""
    activation_noise: str = "residual"
    """none, gaussian, uniform or residual"""
    distillation: float = 0.0
    """weight of the distillation from the given network"""
    labels: float = 1.0
    """weight of the cross-entropy with the labels; 0, with a distillation, reads none"""
    batch_statistics: bool = False
    """BatchNorm normalizes by its batches: for a quantizer that brings the means and deviations of channels back
    (matched, fast), not for plain rounding"""
    output_error: float = 0.0
    """weight of the error between clean and perturbed outputs"""


@dataclass(frozen=True)
class QuantizeOptions:
    """What happens after training."""

    calibration_images: int = 512
    """training images, balanced over the classes, on which ranges are set; all of them where there are fewer"""
    allow: Annotated[tuple[str, ...], arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="")] = ()
    """patterns of products that may stay in float"""
    iterations: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """steps in which a block learns its roundings, in a method that learns them; default: the method's own"""
    memory: float = 4.0
    """gigabytes of cached block inputs that are held in memory; the rest goes into temporary files"""
    constants: str = "float"
    """half: biases, norms, embeddings and scales rounded to half precision, for planish export --constants half"""
    precision: str = "float32"
    """bfloat16: products of lower precision while a method learns, faster on processors with such instructions"""


@dataclass(frozen=True)
class RecordOptions:
    """What is kept and told while it goes on. No number depends on it, so a resumed run may change it."""

    checkpoint_minutes: float = 10.0
    """minutes after which a training saves its state within an epoch, beside the end of each"""
    track: Annotated[tuple[str, ...], arg(metavar="TRACKER [TRACKER ...]", help_behavior_hint="")] = ()
    """tensorboard, wandb, mlflow: write losses, noise and results there, too; nothing leaves this machine unless their
    own variables say so (docs/tracking.md)"""


FREE = tuple(item.name for item in fields(RecordOptions))


@dataclass(frozen=True)
class RunConfig:
    """`planish run`: given -> arms -> schemes -> methods -> evaluation -> run folder."""

    arms: Annotated[tuple[str, ...], arg(metavar="ARM [ARM ...]")] = ("given", "averaged", "flat")
    """given, tuned, averaged, sam, flat"""
    schemes: Annotated[tuple[str, ...], arg(metavar="SCHEME [SCHEME ...]")] = ("w4a4", "w3a3", "w2a4")
    """quantization schemes, such as w8a8 w4a4 w3"""
    methods: Annotated[tuple[str, ...], arg(metavar="METHOD [METHOD ...]")] = ("rtn", "fast")
    """quantization methods; `planish methods` lists them"""
    prepare: Annotated[tuple[str, ...], arg(metavar="SCHEME [SCHEME ...]", help_behavior_hint="")] = ()
    """schemes whose errors the flat arm is trained under, one at a time at random; default: those of --schemes"""
    models: ModelOptions = field(default_factory=ModelOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    record: RecordOptions = field(default_factory=RecordOptions)


@dataclass(frozen=True)
class DiagnosisConfig:
    """`planish diagnose`: which scheme to look at closely, and which ones beside it."""

    scheme: str = "w4a4"
    """the scheme whose errors are looked at closely"""
    schemes: Annotated[tuple[str, ...], arg(metavar="SCHEME [SCHEME ...]")] = ("w8a8", "w6a6", "w4a4", "w3a3", "w2a4")
    """schemes that are predicted, and measured by calibrated rounding"""
    images: int = 0
    """training images to look at; 0: 16 to 512, by what one costs in this network"""
    allow: Annotated[tuple[str, ...], arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="")] = ()
    """patterns of products that may stay in float"""
    models: ModelOptions = field(default_factory=ModelOptions)


def flat_dict(config: Any) -> dict[str, Any]:
    """The settings as one flat dict of plain values, without the grouping."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if hasattr(value, "__dataclass_fields__"):
            values.update(flat_dict(value))
        else:
            values[item.name] = str(value) if isinstance(value, Path) else value
    return values


def _typed(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if value is not None and hint == Path | None else value


def from_flat_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of :func:`flat_dict`, for what config.toml holds: a missing value is ``None``, a list a tuple."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        hint = hints[item.name]
        if hasattr(hint, "__dataclass_fields__"):
            found[item.name] = from_flat_dict(hint, values)
        elif item.name in values:
            found[item.name] = _typed(values[item.name], hint)
        elif item.name not in FREE and (item.default is MISSING or item.default is not None):
            raise KeyError(item.name)
    return kind(**found)
