"""How many images and draws a diagnosis takes, from what one image costs in this network."""

from __future__ import annotations

from dataclasses import dataclass

# Multiply-accumulates of one look at all images. A network of the size of ViT-S/16 at 224 pixels (4.6e9 for an image)
# then takes the least number of images, one of some million multiply-accumulates the most.
BUDGET = 1.5e11
LEAST, MOST = 16, 512


@dataclass(frozen=True)
class Effort:
    """Numbers of images, probes and draws. The same network always gets the same, whatever machine it is on."""

    images: int  # labelled training images: errors, noise, sharpness, prediction
    layer_images: int  # of these, for what is repeated for every layer, and for curvature
    calibration_images: int  # on which ranges are set
    test_images: int  # at most, on which networks are compared
    corrupted_images: int  # of the test images, each in every corruption
    probes: int  # of Hutchinson's estimate of the trace
    steps: int  # of Lanczos' iteration
    draws: int  # of noise
    plane: int  # points along an edge of the landscape


def effort_for(macs: int, images: int = 0) -> Effort:
    """The effort for a network of ``macs`` multiply-accumulates an image; ``images`` overrides the number of images."""
    fitting = int(min(MOST, max(LEAST, BUDGET // max(macs, 1))))
    taken = images or fitting
    small = fitting >= MOST  # so small that nothing has to be spared
    return Effort(
        images=taken,
        layer_images=min(taken, 128 if small else max(LEAST // 2, fitting // 4)),
        calibration_images=512 if small else max(64, fitting),
        test_images=10_000 if small else max(128, 4 * fitting),
        corrupted_images=500 if small else max(32, fitting),
        probes=24 if small else 6,
        steps=40 if small else 10,
        draws=4 if small else 2,
        plane=11 if small else 7,
    )
