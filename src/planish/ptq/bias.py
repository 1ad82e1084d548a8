"""Bias correction: the mean of every output channel is brought back to the float network's."""

from __future__ import annotations

from planish.ptq.outputs import Layer, Moments, change_layers, change_outputs
from planish.ptq.passes import Calibration


class CorrectBias:
    """Empirical bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2 and appendix D), after ``Round``.

    Layer by layer, in the order of execution: the mean of each output channel over the calibration images, in the
    network as it is quantized so far, is taken from the float network's, and the difference goes into the bias. A layer
    without a bias gets one.

    At 4 bits and less this alone can do harm: rounding and clipping also shrink the spread of the outputs, and with the
    means right nothing makes up for that any more. :class:`~planish.ptq.statistics.MatchStatistics` restores both.

    Raises:
        PlanishError: an earlier pass has changed the float weights and no ``KeepFloat`` came before it.
    """

    name = "correct-bias"

    def __call__(self, calibration: Calibration) -> None:
        def shift(layer: Layer, exact: Moments, now: Moments) -> None:
            change_outputs(layer, None, exact.mean - now.mean)

        if not change_layers(calibration, shift):
            calibration.note(self.name, "no layer can take a bias")
