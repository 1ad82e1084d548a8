"""The arms: ways to obtain the network that is then quantized, all with the same epochs over the same images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from planish.errors import PlanishError
from planish.flattening import FlattenSettings, plain
from planish.recipes.config import NoiseOptions, TrainOptions
from planish.training import TrainingSettings


@dataclass(frozen=True)
class Arm:
    """One arm; ``cost`` is what a step costs in plain steps, for the estimate of the remaining time."""

    name: str
    summary: str
    cost: float = 1.0
    paper: str = ""


ARMS = {
    arm.name: arm
    for arm in (
        Arm("given", "the network as it was given, not trained further", 0.0),
        Arm("tuned", "plain fine-tuning"),
        Arm("averaged", "fine-tuning with a moving average of the weights", paper="Polyak and Juditsky 1992"),
        Arm("sam", "fine-tuning with sharpness-aware minimization", 2.0, "Foret et al. 2021, arXiv 2010.01412"),
        Arm(
            "flat", "fine-tuning under the measured errors of the quantizer", 1.15, "in the manner of arXiv 2511.01462"
        ),
    )
}


def training_settings(train: TrainOptions, seed: int) -> TrainingSettings:
    """The options of the command line, all of which the training has by the same names, and a seed."""
    return TrainingSettings(**asdict(train), seed=seed)


def arm_settings(arm: str, train: TrainOptions, noise: NoiseOptions, seed: int) -> FlattenSettings | None:
    """The settings of an arm; ``None`` for ``given``. Raises :class:`PlanishError` for a name that is no arm."""
    if arm not in ARMS:
        raise PlanishError(f"arm {arm!r} is not known: choose from {', '.join(ARMS)}")
    if arm == "given":
        return None
    training = training_settings(train, seed)
    base = plain(training)
    if arm == "tuned":
        return base
    if arm == "averaged":
        return replace(base, averaging=FlattenSettings.averaging)
    if arm == "sam":
        return replace(base, sam=0.05)
    return FlattenSettings(
        weight_noise=noise.weight_noise, activation_noise=noise.activation_noise, distillation=noise.distillation,
        task=noise.labels, output_error=noise.output_error,
        training=replace(training, freeze_batchnorm=not noise.batch_statistics),
    )  # fmt: skip
