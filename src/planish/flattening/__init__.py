"""Flattening: train the full-precision network under the noise that its quantizer will make (DNQ)."""

from planish.flattening.activation_noise import ActivationNoise
from planish.flattening.recipe import FlattenSettings, flatten, plain
from planish.flattening.weight_noise import WeightNoise

__all__ = ["ActivationNoise", "FlattenSettings", "WeightNoise", "flatten", "plain"]
