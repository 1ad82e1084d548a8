"""The commands as dataclasses; tyro makes the options from the fields and the strings below them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from planish.errors import PlanishError
from planish.recipes.config import (
    DiagnosisConfig,
    ModelOptions,
    NoiseOptions,
    OptionalPath,
    QuantizeOptions,
    RecordOptions,
    RunConfig,
    TrainOptions,
)


@dataclass(frozen=True)
class Run(RunConfig):
    """The whole journey: obtain the arms, quantize each by every scheme and method, evaluate, write the run folder."""

    out: OptionalPath = None
    """folder of this run; default: runs/MODEL-DATE-TIME"""
    resume: bool = False
    """continue the interrupted run in --out (default: the newest one) to the identical result, with its options"""
    trust: bool = False
    """with --resume: run the Python file that the interrupted run names as its model"""

    def __post_init__(self) -> None:
        for name in ("arms", "schemes", "methods", "prepare"):
            object.__setattr__(self, name, separate(getattr(self, name)))


def separate(values: tuple[str, ...]) -> tuple[str, ...]:
    """``("given,flat", "flat")`` -> ``("given", "flat")``: commas separate like spaces, and once is enough."""
    return tuple(dict.fromkeys(part for value in values for part in value.split(",") if part))


def named(network: str, models: ModelOptions) -> ModelOptions:
    """The options of the model, whether it was named with --model or without.

    Raises:
        PlanishError: it was named in both ways, differently.
    """
    if not network:
        return models
    if models.model not in (ModelOptions.model, network):
        raise PlanishError(f"two models are named, {network} and --model {models.model}: give one")
    return replace(models, model=network)


@dataclass(frozen=True)
class Flatten:
    """Train a network under the errors of its quantizer and write its clean float weights."""

    network: Positional[Annotated[str, arg(metavar="MODEL", help_behavior_hint="")]] = ""
    """the same as --model: vit or convnet (embedded), a timm name, hf:NAME, torchvision:NAME, or file.py:function"""
    scheme: str = "w4a4"
    """the scheme whose errors are measured and imitated"""
    out: Path = Path("flat.safetensors")
    """file for the flattened weights"""
    overwrite: bool = False
    """replace the file if it is there"""
    models: ModelOptions = field(default_factory=ModelOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    record: RecordOptions = field(default_factory=RecordOptions)
    allow: Annotated[tuple[str, ...], arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="")] = ()
    """patterns of products that may stay in float"""


@dataclass(frozen=True)
class Quantize:
    """Quantize a network on a few training images, print its ledger and write it."""

    network: Positional[Annotated[str, arg(metavar="MODEL", help_behavior_hint="")]] = ""
    """the same as --model: vit or convnet (embedded), a timm name, hf:NAME, torchvision:NAME, or file.py:function"""
    scheme: str = "w4a4"
    """bits of weights and activations, such as w4a4, w4a8 or w3 (weights only)"""
    method: str = "rtn"
    """`planish methods` lists them"""
    budget: Annotated[str | None, arg(metavar="BUDGET", help_behavior_hint="")] = None
    """give each layer's weights bits of their own, as many as fit: 0.9MB, 450kB, 0.13x (of the float size), 2.5Gbops
    (bit operations for one image); activations keep the bits of --scheme"""
    task: str = "classes"
    """what the outputs mean: classes, labels (each of several true or not) or features (a network of timm without its
    head, or one that gives features)"""
    budget_activations: bool = False
    """choose the bits of activations too, attention included; with a budget of bit operations"""
    unlabelled: OptionalPath = None
    """folder of images without labels to calibrate on, in place of --data"""
    out: Path = Path("quantized.safetensors")
    """file for the quantized model"""
    overwrite: bool = False
    """replace the file if it is there"""
    models: ModelOptions = field(default_factory=ModelOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)


@dataclass(frozen=True)
class Train:
    """Train the quantized network itself, and write it as a quantized model with its protocol beside it."""

    network: Positional[Annotated[str, arg(metavar="MODEL", help_behavior_hint="")]] = ""
    """the same as --model: vit or convnet (embedded), a timm name, hf:NAME, torchvision:NAME, or file.py:function"""
    scheme: str = "w4a4"
    """bits of weights and activations, such as w2a4"""
    method: str = "lsq"
    """`planish methods` lists them"""
    option: UseAppendAction[
        Annotated[tuple[tuple[str, ...], ...], arg(metavar="NAME=VALUE [NAME=VALUE ...]", help_behavior_hint="")]
    ] = ()
    """options of the method, which `planish methods METHOD` lists; may be given several times"""
    start: str = "given"
    """given, flat (flattened first), or a file that planish quantize or planish train wrote"""
    flat_epochs: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """of --epochs, those that go into flattening with --start flat (default: half), so that all epochs stay --epochs"""
    unlabelled: OptionalPath = None
    """folder of images without labels, for a method that takes them (cr)"""
    out: Path = Path("trained.safetensors")
    """file for the quantized model; its protocol goes into a .json file beside it"""
    overwrite: bool = False
    """replace the file if it is there"""
    models: ModelOptions = field(default_factory=ModelOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    record: RecordOptions = field(default_factory=RecordOptions)


@dataclass(frozen=True)
class Evaluate:
    """Measure a network, float or quantized, on the test images: top-1, NLL, calibration error, flips."""

    file: Positional[Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]] = None
    """a file that planish wrote, quantized or float; without it --model and --weights say what to measure"""
    task: str = ""
    """what the outputs mean: classes, labels or features; default: what the file says, else classes"""
    against: Annotated[str, arg(metavar="MODEL|FILE", help_behavior_hint="")] = ""
    """the network in float to compare with, by name (with --weights) or as a file that planish wrote: its answers, or
    the direction of its features"""
    models: ModelOptions = field(default_factory=ModelOptions)
    trust: bool = False
    """run the Python file that a quantized model names as its architecture"""


@dataclass(frozen=True)
class Diagnose(DiagnosisConfig):
    """Measure why a network breaks at low bits: errors, curvature, sharpness, what each layer loses, what to do."""

    network: Positional[Annotated[str, arg(metavar="MODEL|RUN", help_behavior_hint="")]] = ""
    """the same as --model: vit or convnet (embedded), a timm name, hf:NAME, torchvision:NAME, or file.py:function; or
    the folder of a run, whose arms are looked at and whose report is completed"""
    against: Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]", help_behavior_hint="")] = ()
    """weights of the same network to set beside it, such as those that planish flatten wrote"""
    out: OptionalPath = None
    """folder of the results; default: runs/diagnose-MODEL-DATE-TIME"""
    resume: bool = False
    """continue the interrupted diagnosis in --out to the identical result, with its options"""
    trust: bool = False
    """with --resume or the folder of a run: run the Python file that it names as its model"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", separate(self.schemes))


@dataclass(frozen=True)
class Export:
    """Write a quantized network as an ONNX file for stock ONNX Runtime, check it, and time it."""

    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """what planish quantize or train wrote; or the name of a network, as for --model, for a file in float"""
    weights: OptionalPath = None
    """weights of the network that is named, such as those that planish flatten wrote"""
    out: Path = Path("model.onnx")
    """the ONNX file"""
    overwrite: bool = False
    """replace the file if it is there"""
    layout: str = "small"
    """small: weights at 2 or 4 bits, widened when the file is loaded; fast: as bytes, which load sooner"""
    output_bits: Annotated[int | None, arg(metavar="8", help_behavior_hint="")] = None
    """8: give outputs of convolutions that would stay in float a grid of 8 bits; faster, and it changes the network"""
    constants: str = "float"
    """half: biases, norms, embeddings, scales in half precision; changes a network that was not quantized with that"""
    data: OptionalPath = None
    """images to check and calibrate on, as for planish quantize (default: the embedded ones)"""
    images: int = 2000
    """test images on which the file is compared with the network"""
    calibration_images: int = 512
    """training images for --output-bits, and for ONNX Runtime's own quantization beside it"""
    timing: bool = True
    """time it beside the float file and ONNX Runtime's own 8-bit quantization of it"""
    threads: int = 1
    """CPU threads of the timing"""
    seed: int = 0
    """which training images calibrate"""
    trust: bool = False
    """run the Python file that the network's file names as its architecture"""


@dataclass(frozen=True)
class Classify:
    """Name what images show, with an exported model, in ONNX Runtime alone."""

    model: Positional[Annotated[Path, arg(metavar="MODEL.onnx")]]
    """a file that planish exported"""
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")]] = ()
    """image files, or folders of which all images are taken"""
    top: int = 3
    """labels for each image, the most probable first"""
    json: bool = False
    """print one JSON object a line"""
    threads: int = 1
    """CPU threads"""


@dataclass(frozen=True)
class Demo:
    """Serve a page on this machine alone, where one drops a picture and sees what the model says."""

    model: Positional[Annotated[Path, arg(metavar="MODEL.onnx")]]
    """a file that planish exported"""
    against: OptionalPath = None
    """another exported file of the same classes, such as the float model, whose answers are shown beside"""
    port: int = 8000
    """where the page is served on 127.0.0.1; 0: any that is free"""
    threads: int = 1
    """CPU threads"""


@dataclass(frozen=True)
class Compare:
    """Put several runs into one table and chart, and say in what they differ."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN RUN [RUN ...]", help_behavior_hint="")]] = ()
    """folders of runs, finished or interrupted"""
    out: OptionalPath = None
    """an HTML file for the table, the chart and the differences"""
    overwrite: bool = False
    """replace the file if it is there"""


@dataclass(frozen=True)
class Methods:
    """List every method with its paper, or the options of one method."""

    name: Positional[Annotated[str, arg(metavar="METHOD", help_behavior_hint="")]] = ""
    """a method, whose options are listed"""
