"""The noise that a scheme makes in a network: the error of every site, and what the errors have to do with each other.

Pre-training against quantization noise takes the errors ``e = Q(x) - x`` for independent Gaussians (arXiv 2511.01462,
whose recorders keep a mean and a variance of each). Rounding theory says uniform, of variance ``s^2/12``, where a
tensor varies over many steps ``s`` (Bennett, "Spectra of Quantized Signals", 1948; Widrow and Kollar, "Quantization
Noise", 2008). Here both claims are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from planish.flatness.correlations import Correlations, correlate
from planish.flatness.perturbations import chosen
from planish.flatness.site_errors import SiteError, site_errors
from planish.flatness.subject import Subject


@dataclass(frozen=True)
class ErrorModel:
    """Errors of all quantized sites in the order of execution, and their correlations; see :func:`error_model`."""

    sites: list[SiteError]
    correlations: Correlations
    scheme: str
    images: int


def error_model(subject: Subject, scheme: str, *, images: int | None = None, seed: int = 0) -> ErrorModel:
    """Measure the error that a scheme makes at every site, on the values that the float network has there.

    Three looks at the images: one for the sites, one for the correlations inside each product, and one with gradients
    for the correlation between layers. Nothing is rounded while they run.

    Args:
        images: how many images to look at, taken evenly; default: all.
        seed: of the signs that the chance levels are drawn with.

    Raises:
        PlanishError: the subject was not prepared for this scheme, or fewer than one image is asked for.
    """
    batches = chosen(subject, images)
    count = sum(len(labels) for _, labels in batches)
    grids = subject.grids(scheme)
    sites = site_errors(subject, grids, batches)
    return ErrorModel(sites, correlate(subject, grids, batches, seed=seed), scheme, count)
