"""From a tensor to a grid: range setting, modules that hold a grid, and quantizers that are trained."""

from planish.quantizers.dorefa import DoReFaQuantizer
from planish.quantizers.later import LaterQuantizer
from planish.quantizers.learned import LearnedQuantizer, learned_quantize
from planish.quantizers.pact import PACTQuantizer
from planish.quantizers.ranges import fit_grid
from planish.quantizers.running import RunningRange
from planish.quantizers.shifted import ShiftedLearnedQuantizer, ShiftedQuantizer
from planish.quantizers.statistics import StatsQuantizer
from planish.quantizers.trainable import FixedQuantizer, TrainableQuantizer
from planish.quantizers.uniform import UniformQuantizer

__all__ = [
    "DoReFaQuantizer",
    "FixedQuantizer",
    "LaterQuantizer",
    "LearnedQuantizer",
    "PACTQuantizer",
    "RunningRange",
    "ShiftedLearnedQuantizer",
    "ShiftedQuantizer",
    "StatsQuantizer",
    "TrainableQuantizer",
    "UniformQuantizer",
    "fit_grid",
    "learned_quantize",
]
