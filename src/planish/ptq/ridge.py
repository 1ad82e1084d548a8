"""A closed-form change of every layer's weight and bias that makes up for its quantized inputs.

The first step ("Aqer") of ERQ (Zhong et al. 2024, arXiv 2407.06794, section 4.2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Site, detach
from planish.ptq.layers import LayerCall, layer_weights, parameter_at
from planish.ptq.outputs import keep_float
from planish.ptq.passes import Calibration
from planish.ptq.walk import check_memory, peek, visit_layers

FOLDS = 4  # parts of the images of which each is predicted from the others, where lam is chosen
LAMS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # that it is chosen from
WIDE = 1024  # inputs from which on only the first part is predicted: the time grows with their third power


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
        folds: both sums over each of a few parts of the images; empty if they were not asked for.
    """

    gram: Tensor
    cross: Tensor | None
    folds: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def inputs(self) -> Tensor:
        """X X^T without the row of ones: (G, K, K)."""
        return self.gram[:, :-1, :-1]

    def change(self, lam: float | None, *, bias: bool) -> Tensor:
        """What :func:`solve_ridge` gives: (G, R, K + 1) with a bias in the last column, else (G, R, K).

        Without ``lam``, with that of :data:`LAMS` whose changes take most off the squared error of parts of the images
        that they were not computed from; zeros if none takes anything off.
        """
        assert self.cross is not None
        end = None if bias else -1
        gram, cross = self.gram[:, :end, :end], self.cross[:, :, :end]
        if lam is None:
            costs = {share: self._cost_elsewhere(share, end) for share in LAMS}
            lam = min(costs, key=costs.__getitem__)
            if not costs[lam] < 0:
                return torch.zeros_like(cross)
        return solve_ridge(gram, cross, lam, ones=bias)

    def _cost_elsewhere(self, lam: float, end: int | None) -> float:
        """What the changes from all folds but one add to the squared error of that one, summed over the folds."""
        assert self.cross is not None
        cost = 0.0
        for fold in self.folds if self.gram.shape[-1] <= WIDE else self.folds[:1]:
            gram, cross = (sums[:, :, :end] for sums in fold)
            gram = gram[:, :end]
            rest = self.gram[:, :end, :end] - gram, self.cross[:, :, :end] - cross
            change = solve_ridge(*rest, lam, ones=end is None)
            cost += float((change @ gram * change).sum() - 2 * (change * cross).sum())
        return cost


def moments(calls: Iterable[tuple[LayerCall, Tensor | None]], *, robust: bool = False, folds: bool = False) -> Moments:
    """The sums over the calls of a layer, each with what its output is missing.

    Args:
        robust: weigh the columns by 1 / (1 + q), q the squared length of what a column's output lacks (of the column
            itself, if no outputs are given) over the median of a call. Else a few tokens or places can outweigh all
            others: in trained transformers, those with massive activations.
        folds: also the sums over each of :data:`FOLDS` parts of the images of each call.

    Raises:
        PlanishError: they are not finite.
    """
    sums: list[list[Tensor | None]] = [[None, None] for _ in range(FOLDS if folds else 1)]
    site = ""
    for number, (call, rest) in enumerate(calls):
        site = call.site
        for x, e in call.columns(rest):
            x = F.pad(x, (0, 0, 0, 1), value=1.0)
            if robust:
                root = _column_weights(x if e is None else e).sqrt()
                x, e = x * root, None if e is None else e * root
            # columns go from image to image; where there are fewer of them than folds, call after call gets the next
            turn = number % len(sums) if x.shape[-1] < len(sums) else 0
            others = [None] * len(sums) if e is None else e.tensor_split(len(sums), -1)
            for one, part, other in zip(
                [*sums[turn:], *sums[:turn]], x.tensor_split(len(sums), -1), others, strict=True
            ):
                if part.shape[-1] == 0:
                    continue
                one[0] = _added(one[0], part, part)
                one[1] = one[1] if other is None else _added(one[1], other, part)
    grams = [gram for gram, _ in sums if gram is not None]
    crosses = [cross for _, cross in sums if cross is not None]
    if not all(tensor.isfinite().all() for tensor in (*grams, *crosses)):
        what = "inputs or outputs" if crosses else "inputs"
        raise PlanishError(
            f"{site}: {what} of this layer are not finite or too large to be squared; look for an overflow in the "
            f"layers before it"
        )
    pairs = tuple(zip(grams, crosses, strict=False)) if folds and len(grams) > 1 else ()  # one has no rest
    return Moments(reduce(torch.add, grams), reduce(torch.add, crosses) if crosses else None, pairs)


def _added(so_far: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    product = (left @ right.transpose(1, 2)).double()
    return product if so_far is None else so_far.add_(product)


def _column_weights(x: Tensor) -> Tensor:
    """(M,) for x (G, R, M), between 0 and 1; 1/2 for the median column, 1 for all if that is zero."""
    lengths = x.square().sum((0, 1))
    median = lengths.median()
    return 1 / (1 + lengths / median) if median > 0 else torch.ones_like(lengths)


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

    Where the inputs have a few very large channels and columns, as in vision transformers trained on ImageNet, one
    lam does not fit all layers and the correction can do harm: there ``lam=None`` and ``robust=True`` help.

    Attributes:
        lam: of the ridge, as a share of the mean diagonal; ``None``: for each layer the one that predicts best what
            images lack that were left out (four-fold cross-validation; one of the folds for a layer of 1,024 inputs or
            more), or no correction if none predicts anything.
        robust: give columns less weight whose outputs lack more than the median column's (:func:`moments`).
        memory: gigabytes of outputs of blocks that are held in memory; beyond it, in temporary files.

    Raises:
        PlanishError: lam is not above 0, or inputs of a layer are not finite.
    """

    lam: float | None = 0.1
    robust: bool = False
    memory: float = 4.0

    name = "ridge"

    def __post_init__(self) -> None:
        check_memory(self.name, self.memory)
        if self.lam is not None and not 0 < self.lam < float("inf"):
            raise PlanishError(
                f"ridge: lam is {self.lam}: give a share of the mean diagonal above 0, such as 0.1, or None to have it "
                f"chosen for each layer"
            )

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
        sums = moments(missing(calls), robust=self.robust, folds=self.lam is None)
        change = sums.change(self.lam, bias=bias is not None)
        if bias is not None:
            bias.add_(change[..., -1].flatten())
            change = change[..., :-1]
        weight.add_(first.from_matrix(change))
        return sums
