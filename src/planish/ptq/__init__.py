"""Post-training quantization: passes, the methods that are lists of them, and ``quantize``."""

from planish.ptq.constants import HalveConstants
from planish.ptq.heads import ScaleHeads
from planish.ptq.methods import METHODS, Method, get_method, with_settings
from planish.ptq.passes import Calibration, Pass
from planish.ptq.quantize import quantize
from planish.ptq.reconstruction import Reconstruct
from planish.ptq.refine import RefineRanges
from planish.ptq.rounding import Calibrate, FoldBatchNorm, Round
from planish.ptq.rows import ScaleRows
from planish.ptq.smoothing import SmoothHidden
from planish.ptq.splitting import SplitOutliers

__all__ = [
    "METHODS",
    "Calibrate",
    "Calibration",
    "FoldBatchNorm",
    "HalveConstants",
    "Method",
    "Pass",
    "Reconstruct",
    "RefineRanges",
    "Round",
    "ScaleHeads",
    "ScaleRows",
    "SmoothHidden",
    "SplitOutliers",
    "get_method",
    "quantize",
    "with_settings",
]
