"""A closed-form change of every layer's weight and bias that makes up for its quantized inputs.

The first step ("Aqer") of ERQ (Zhong et al. 2024, arXiv 2407.06794, section 4.2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Site, detach
from planish.ptq.layers import LayerCall, layer_weights, parameter_at, visit_layers
from planish.ptq.outputs import keep_float
from planish.ptq.passes import Calibration


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


def moments(calls: list[LayerCall], missing: Iterable[Tensor], *, ones: bool) -> tuple[Tensor, Tensor]:
    """X X^T (G, K, K) and E X^T (G, R, K), float64, of a layer's inputs X and what its outputs are ``missing``."""
    gram: Tensor | None = None
    cross: Tensor | None = None
    for call, rest in zip(calls, missing, strict=True):
        for x, e in call.columns(rest):
            assert e is not None
            x = F.pad(x, (0, 0, 0, 1), value=1.0) if ones else x
            one, two = (x @ x.transpose(1, 2)).double(), (e @ x.transpose(1, 2)).double()
            gram = one if gram is None else gram.add_(one)
            cross = two if cross is None else cross.add_(two)
    assert gram is not None
    assert cross is not None
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise PlanishError(
            f"{calls[0].site}: inputs or outputs of this layer are not finite or too large to be squared; look for an "
            f"overflow in the layers before it"
        )
    return gram, cross


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

    Raises:
        PlanishError: lam is not above 0, or inputs of a layer are not finite.
    """

    lam: float = 0.1

    name = "ridge"

    def __post_init__(self) -> None:
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

        def decide(name: str, calls: list[list[LayerCall]]) -> None:
            self.correct(model, wanted[name], *calls)

        visit_layers([model, twin], plan.products, calibration.batches, wanted, decide)

    def correct(self, model: nn.Module, site: Site, quantized: list[LayerCall], exact: list[LayerCall]) -> None:
        """Change the weight at ``site`` and its bias; the calls are those in ``model`` and in the float network."""
        weight, call = parameter_at(model, site), quantized[0]
        bias = next((p for p in model.parameters() if p is call.bias), None)  # not one that is computed on the way
        missing = (there.output() - here.output() for here, there in zip(quantized, exact, strict=True))
        change = solve_ridge(*moments(quantized, missing, ones=bias is not None), self.lam, ones=bias is not None)
        if bias is not None:
            bias.add_(change[..., -1].flatten())
            change = change[..., :-1]
        weight.add_(call.from_matrix(change))
