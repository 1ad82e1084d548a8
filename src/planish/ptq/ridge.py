"""A closed-form change of every layer's weight and bias that makes up for its quantized inputs.

The first step ("Aqer") of ERQ (Zhong et al. 2024, arXiv 2407.06794, section 4.2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Site, detach
from planish.ptq.layers import LayerCall, layer_weights, parameter_at
from planish.ptq.outputs import keep_float
from planish.ptq.passes import Calibration
from planish.ptq.walk import check_memory, peek, visit_layers


def solve_ridge(gram: Tensor, cross: Tensor, lam: float, *, ones: bool) -> Tensor:
    """The D that minimizes |E - D X|^2 + lam m |D|^2, where m is the mean of the diagonal of X X^T.

    Args:
        gram: X X^T, (G, K, K), float64.
        cross: E X^T, (G, R, K), float64.
        lam: share of the mean diagonal; above 0.
        ones: the last row of X holds ones; what it is multiplied by, the bias, is free and not in the mean.

    Returns:
        (G, R, K), float64.
    """
    penalty = torch.ones_like(gram[:, 0])
    if ones:
        penalty[:, -1] = 0
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = (diagonal * penalty).sum(-1, keepdim=True) / penalty.sum(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)  # all inputs are zero: D is, too
    return torch.linalg.solve(gram + torch.diag_embed(lam * mean * penalty), cross, left=False)


@dataclass(frozen=True)
class Moments:
    """Sums over all columns of a layer's inputs X, with a row of ones below them, and of what its outputs lack, E.

    Attributes:
        gram: X X^T, (G, K + 1, K + 1), float64.
        cross: E X^T, (G, R, K + 1), float64; ``None`` if no outputs were given.
    """

    gram: Tensor
    cross: Tensor | None

    @property
    def inputs(self) -> Tensor:
        """X X^T without the row of ones: (G, K, K)."""
        return self.gram[:, :-1, :-1]

    def change(self, lam: float, *, bias: bool) -> Tensor:
        """What :func:`solve_ridge` gives: (G, R, K + 1) with a bias in the last column, else (G, R, K)."""
        assert self.cross is not None
        end = None if bias else -1
        return solve_ridge(self.gram[:, :end, :end], self.cross[:, :, :end], lam, ones=bias)


def moments(calls: Iterable[tuple[LayerCall, Tensor | None]]) -> Moments:
    """The sums over the calls of a layer, each with what its output is missing.

    Raises:
        PlanishError: they are not finite.
    """
    gram: Tensor | None = None
    cross: Tensor | None = None
    site = ""
    for call, rest in calls:
        site = call.site
        for x, e in call.columns(rest):
            x = F.pad(x, (0, 0, 0, 1), value=1.0)
            one = (x @ x.transpose(1, 2)).double()
            gram = one if gram is None else gram.add_(one)
            if e is not None:
                two = (e @ x.transpose(1, 2)).double()
                cross = two if cross is None else cross.add_(two)
    assert gram is not None
    if not (gram.isfinite().all() and (cross is None or cross.isfinite().all())):
        what = "inputs" if cross is None else "inputs or outputs"
        raise PlanishError(
            f"{site}: {what} of this layer are not finite or too large to be squared; look for an overflow in the "
            f"layers before it"
        )
    return Moments(gram, cross)


def missing(calls: Iterable[tuple[LayerCall, ...]]) -> Iterator[tuple[LayerCall, Tensor]]:
    """From the calls of a layer in the quantized and in the float network: the first, and what its output lacks."""
    for here, there in calls:
        yield here, there.output() - here.output()


@dataclass(frozen=True)
class RidgeCorrection:
    """Move the weights so that a layer with quantized inputs gives what it gives in the float network.

    With X the quantized inputs of all images (and a row of ones for the bias) and E = Y - W X what is missing from the
    float network's outputs Y, the change is E X^T (X X^T + lam m I)^-1 with m the mean of the diagonal of X X^T, for
    each group of a convolution on its own. The bias is not penalized; a layer without one gets none. Layers are
    corrected in the order of execution: the inputs of a layer come from the corrected layers before it. Goes between
    ``Calibrate`` and the rounding of the weights.

    Attributes:
        lam: of the ridge, as a share of the mean diagonal.
        memory: gigabytes of outputs of blocks that are held in memory; beyond it, in temporary files.

    Raises:
        PlanishError: lam is not above 0, or inputs of a layer are not finite.
    """

    lam: float = 0.1
    memory: float = 4.0

    name = "ridge"

    def __post_init__(self) -> None:
        check_memory(self.name, self.memory)
        if not 0 < self.lam < float("inf"):
            raise PlanishError(f"ridge: lam is {self.lam}: give a share of the mean diagonal above 0, such as 0.1")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        keep_float(calibration)
        plan, model = calibration.assignment, calibration.model
        quantized = {site.name for site, _ in plan.quantized()}
        if not any(site.name in quantized and not site.is_weight for p in plan.products for site in p.sites):
            text = "no activation is quantized, so there is nothing to make up for"
            calibration.note(self.name, text)
            return
        twin = copy.deepcopy(model)
        detach(twin)
        wanted = {name: site for name, site in layer_weights(plan).items() if name in quantized}

        def decide(name: str, calls: Iterable[tuple[LayerCall, ...]]) -> None:
            self.correct(model, wanted[name], calls)

        visit_layers([model, twin], plan.products, calibration.batches, wanted, decide, memory=self.memory)

    def correct(self, model: nn.Module, site: Site, calls: Iterable[tuple[LayerCall, ...]]) -> Moments:
        """Change the weight at ``site`` and its bias; the calls are those in ``model`` and in the float network."""
        (first, *_), calls = peek(calls)
        weight = parameter_at(model, site)
        bias = next((p for p in model.parameters() if p is first.bias), None)  # not one that is computed on the way
        sums = moments(missing(calls))
        change = sums.change(self.lam, bias=bias is not None)
        if bias is not None:
            bias.add_(change[..., -1].flatten())
            change = change[..., :-1]
        weight.add_(first.from_matrix(change))
        return sums
