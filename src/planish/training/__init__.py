"""The one training loop, and the ingredients that every method shares."""

from planish.training.averaging import Averaging
from planish.training.engine import make_accelerator
from planish.training.ingredients import Ingredient
from planish.training.loop import Interrupted, Run, TrainingFailed, TrainingSettings, train
from planish.training.objectives import Distillation, OutputError, TaskLoss
from planish.training.regularizers import GradientL1, Kurtosis
from planish.training.sam import SAM

__all__ = [
    "SAM",
    "Averaging",
    "Distillation",
    "GradientL1",
    "Ingredient",
    "Interrupted",
    "Kurtosis",
    "OutputError",
    "Run",
    "TaskLoss",
    "TrainingFailed",
    "TrainingSettings",
    "make_accelerator",
    "train",
]
