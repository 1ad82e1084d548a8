"""Models by name, with their weights and the preprocessing that they expect."""

from planish.models.embedded import EMBEDDED_MODELS, card
from planish.models.load import LoadedModel, build, check_classes, check_output, classes_of, load_model, loses_head
from planish.models.preprocessing import Preprocessing, preprocessing_from
from planish.models.weights import fit_weights, read_weights, save_weights, state_hash

__all__ = [
    "EMBEDDED_MODELS",
    "LoadedModel",
    "Preprocessing",
    "build",
    "card",
    "check_classes",
    "check_output",
    "classes_of",
    "fit_weights",
    "load_model",
    "loses_head",
    "preprocessing_from",
    "read_weights",
    "save_weights",
    "state_hash",
]
