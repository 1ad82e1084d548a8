"""From a tensor to a grid: range setting, and modules that hold a grid."""

from planish.quantizers.ranges import fit_grid
from planish.quantizers.running import RunningRange
from planish.quantizers.uniform import UniformQuantizer

__all__ = ["RunningRange", "UniformQuantizer", "fit_grid"]
