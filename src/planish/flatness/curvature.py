"""How strongly the loss bends at the trained weights: trace, top eigenvalues and spectral density of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.flatness.density import Density, broadened
from planish.flatness.hessian import MEMORY, Hessian, Loss
from planish.flatness.lanczos import lanczos
from planish.flatness.subject import Subject
from planish.flatness.trace import Estimate, trace_samples

EXACT = 2000  # weights


@dataclass(frozen=True)
class LayerCurvature:
    """The trace of one parameter's own block of the Hessian, with its standard error."""

    layer: str  # name of the parameter
    weights: int
    trace: float
    error: float


@dataclass(frozen=True)
class Curvature:
    """The Hessian of the mean loss with respect to the weights.

    Attributes:
        trace: its sum over all weights, in nats for weights in their own units.
        eigenvalues: the largest, in descending order; fewer where there are fewer weights.
        residuals: for each of them ``|H u - value u|``, u of length 1: the error is at most that.
        lowest: the most negative eigenvalue that was seen.
        density: of all eigenvalues.
        layers: in the order of the parameters.
        weights, images: how many.
        probes: vectors behind the trace; as many as weights where it is exact.
        steps: of Lanczos' method; 0 where all eigenvalues were computed.
    """

    trace: Estimate
    eigenvalues: list[float]
    residuals: list[float]
    lowest: float
    density: Density
    layers: list[LayerCurvature]
    weights: int
    images: int
    probes: int
    steps: int


def curvature(
    subject: Subject | nn.Module,
    *,
    batches: Iterable[Any] | None = None,
    parameters: Mapping[str, nn.Parameter] | None = None,
    loss: Loss = F.cross_entropy,
    probes: int = 16,
    steps: int = 60,
    runs: int = 1,
    eigenvalues: int = 5,
    per_layer: bool = True,
    exact: int = EXACT,
    memory: int = MEMORY,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Curvature:
    """Measure the curvature of the loss.

    Args:
        subject: a subject, of which the folded float network is looked at, or any classifier, which runs in evaluation
            mode. Model and statistics are as they were afterwards.
        batches: (inputs, labels); default: the subject's. With an accelerator, each process passes its own.
        parameters: by name; default: the weights that a subject's schemes quantize, or all parameters of a classifier.
        loss: of (logits, labels), a mean over the images of a batch.
        probes: vectors of random signs for the trace, at least 2 for a standard error.
        steps: at most so many of Lanczos' method, which hold ``steps * weights`` numbers. The run ends earlier when the
            largest eigenvalues are found to a relative residual of 1e-4.
        runs: of Lanczos' method that the density is averaged over. The first is the one behind the eigenvalues.
        eigenvalues: how many of the largest; fewer come back where there are fewer steps.
        per_layer: whether to report the traces of the layers; they cost nothing.
        exact: up to so many weights, the whole matrix is computed, and all results are those of the matrix.
        memory: bytes that may go to graphs (see :class:`Hessian`).
        accelerator: sums over processes; they all get the same result.
        progress: called with (products done, most products that may be needed).

    Raises:
        PlanishError: a number below 1, a switch of the subject that is not idle, or what :class:`Hessian` raises.
    """
    for name, number in (("probes", probes), ("steps", steps), ("runs", runs), ("eigenvalues", eigenvalues)):
        if number < 1:
            raise PlanishError(f"{name} is {number}: curvature needs at least 1")
    model, batches, parameters = _resolve(subject, batches, parameters)
    hessian = Hessian(model, batches, parameters, loss, memory=memory, accelerator=accelerator)
    small = hessian.size <= exact
    most = hessian.size if small else probes + min(steps, hessian.size) * runs
    if progress is not None:
        hessian.notify = lambda: progress(hessian.products, most)
    found = _exact(hessian, eigenvalues) if small else _estimated(hessian, probes, steps, runs, eigenvalues, seed)
    samples, tops, residuals, lowest, density, taken = found
    estimate = Estimate.exact if small else Estimate.of
    layers = []
    for (name, parameter), column in zip(hessian.parameters.items(), samples.T, strict=True):
        part = estimate(column)
        layers.append(LayerCurvature(name, parameter.numel(), part.value, part.error))
    return Curvature(
        trace=estimate(samples.sum(1)),
        eigenvalues=tops.tolist(),
        residuals=residuals.tolist(),
        lowest=lowest,
        density=density,
        layers=layers if per_layer else [],
        weights=hessian.size,
        images=hessian.images,
        probes=hessian.size if small else probes,
        steps=taken,
    )


Found = tuple[Tensor, Tensor, Tensor, float, Density, int]


def _exact(hessian: Hessian, count: int) -> Found:
    matrix = hessian.dense()
    values = torch.linalg.eigvalsh(matrix).flip(0)
    top = values[:count]
    density = broadened([values], [torch.full_like(values, 1 / len(values))])
    return hessian.layer_sums(matrix.diagonal())[None], top, torch.zeros_like(top), values[-1].item(), density, 0


def _estimated(hessian: Hessian, probes: int, steps: int, runs: int, count: int, seed: int) -> Found:
    generator = torch.Generator().manual_seed(seed)
    first = lanczos(hessian, steps, generator=generator, wanted=min(count, hessian.size))
    samples = trace_samples(hessian, probes, generator=generator, krylov=first)
    values, residuals, weights = first.ritz()
    taken = len(values)
    nodes, shares, lowest = [values], [weights], values[-1].item()
    del first  # its basis is as large as many copies of the network
    for _ in range(runs - 1):
        more, _, weights = lanczos(hessian, taken, generator=generator).ritz()
        nodes.append(more)
        shares.append(weights)
        lowest = min(lowest, more[-1].item())
    return samples, values[:count], residuals[:count], lowest, broadened(nodes, shares), taken


def _resolve(
    subject: Subject | nn.Module, batches: Iterable[Any] | None, parameters: Mapping[str, nn.Parameter] | None
) -> tuple[nn.Module, Iterable[Any], Mapping[str, nn.Parameter] | None]:
    """The model, its images and the parameters that were asked for (``None``: all)."""
    if not isinstance(subject, Subject):
        if batches is None:
            raise PlanishError("the curvature of a model needs images: pass batches of (images, labels)")
        return subject, batches, parameters
    busy = next((name for name, switch in subject.switches.items() if not switch.idle), None)
    if busy is not None:
        raise PlanishError(
            f"{busy}: a tap is switched in, but curvature is the float network's: leave subject.tapped first"
        )
    if parameters is None:
        sites = [site for site in subject.sites if site.is_weight and site.parameter]
        held = {site.name: subject.model.get_submodule(site.owner)._parameters[site.slot] for site in sites}
        parameters = {name: parameter for name, parameter in held.items() if parameter is not None}
    return subject.model, subject.batches if batches is None else batches, parameters
