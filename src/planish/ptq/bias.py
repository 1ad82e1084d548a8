"""Bias correction: the mean of every output channel is brought back to the float network's."""

from __future__ import annotations

from planish.ptq.outputs import change_outputs, float_twin, layers_of, output_moments
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
        layers = layers_of(calibration)
        if not layers:
            calibration.note(self.name, "no layer can take a bias")
            return
        model, batches = calibration.model, calibration.batches
        exact = output_moments(float_twin(calibration), [layer.path for layer in layers], batches)
        for layer in layers:
            if layer.path in exact:
                once = exact[layer.path].calls == len(batches)
                now = output_moments(model, [layer.path], batches, stop=once)[layer.path]
                change_outputs(layer, None, exact[layer.path].mean - now.mean)
