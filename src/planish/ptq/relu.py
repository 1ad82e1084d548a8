"""ReLU in place of the GELU of every MLP: what is left after it has no long flat tail to spend levels on.

The MLP reconstruction of APHQ-ViT (Wu et al. 2025, arXiv 2504.02508, section 3.3). It changes the network that is
quantized, not only its numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planish.errors import PlanishError
from planish.network.batches import first_image, size_of
from planish.network.mlps import MLP, find_mlps, put_relu
from planish.ptq.exactness import require_float
from planish.ptq.layers import LayerCall
from planish.ptq.passes import Calibration
from planish.ptq.ridge import moments
from planish.ptq.trial import rounded_copy
from planish.ptq.tuning import Images, Tuning
from planish.ptq.walk import check_memory, visit_layers

QUANTILE = 0.99  # of the positive values before the second layer; the loss with those above clipped counts, too
CLIPPED = 2.0  # times (released code)
CHUNK = 2**14  # rows whose hidden values are held at once
LAM = 1e-4  # of the ridge that the second layer begins with


@dataclass
class _Layers:
    """The weights and biases of the two layers."""

    values: list[Tensor]

    def hidden(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values[0], self.values[1])

    def output(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.values[2], self.values[3])


def reconstruct_mlp(
    layers: Sequence[Tensor], x: Tensor, y: Tensor, *, iterations: int, lr: float, batch: int, seed: int = 0
) -> list[Tensor]:
    """Weights and biases ``(W1, b1, W2, b2)`` with which ``W2 relu(W1 x + b1) + b2`` is near y.

    The second layer begins with a ridge regression; then both follow the gradient of the squared error plus twice the
    one with hidden values clipped at the 99th percentile of the positive ones, each relative to the variance of y.

    Args:
        layers: what they are in the float network.
        x: inputs, (N, C).
        y: (N, D), what the float network's MLP gives.
        iterations: steps of Adam; its learning rate falls from ``lr`` to 0 along a cosine.
        lr: relative to the root mean square of each tensor.
        batch: rows of a step.
    """
    values, x, y = [value.detach().clone().float() for value in layers], x.float(), y.float()
    mlp = _Layers(values)

    def calls() -> Iterator[tuple[LayerCall, Tensor]]:
        for some, wanted in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            hidden = mlp.hidden(some).relu_()
            call = LayerCall("second", F.linear, {"input": hidden, "weight": values[2], "bias": values[3]})
            yield call, wanted - mlp.output(hidden)

    change = moments(calls()).change(LAM, bias=True)[0]
    values[2] += change[:, :-1]
    values[3] += change[:, -1]
    power = (y - y.mean(0)).square().mean().clamp(min=torch.finfo(y.dtype).tiny)
    with torch.enable_grad():
        for value in values:
            value.requires_grad_()
        sizes = [values[i].detach().square().mean().sqrt().item() for i in (0, 0, 2, 2)]
        groups = [{"params": [v], "lr": lr * (size or 1.0)} for v, size in zip(values, sizes, strict=True)]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (1 + math.cos(math.pi * s / iterations)) / 2)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(iterations):
            rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator).to(x.device)
            hidden, wanted = mlp.hidden(x[rows]).relu(), y[rows]
            limit = _upper(hidden.detach())
            loss = F.mse_loss(mlp.output(hidden), wanted)
            loss = loss + CLIPPED * F.mse_loss(mlp.output(hidden.clamp(max=limit)), wanted)
            optimizer.zero_grad()
            (loss / power).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return [value.detach() for value in values]


def _upper(hidden: Tensor) -> float:
    positive = hidden[hidden > 0]
    if not len(positive):
        return math.inf
    return float(positive.kthvalue(max(1, round(QUANTILE * len(positive)))).values)


def relative_error(layers: Sequence[Tensor], x: Tensor, y: Tensor) -> float:
    """The squared error of ``W2 relu(W1 x + b1) + b2`` as a share of the variance of y."""
    mlp = _Layers(list(layers))
    rest = mlp.output(mlp.hidden(x).relu_()) - y
    return float(rest.square().mean() / (y - y.mean(0)).square().mean().clamp(min=torch.finfo(y.dtype).tiny))


@dataclass(frozen=True)
class ReplaceGELU:
    """Exchange the GELU of every MLP for a ReLU, and fit the MLP's two layers to what it gave in float.

    The first pass of a list, or after ``PrepareNorms``: it changes the network in float. MLPs are done in the order of
    execution, each on the inputs that the changed network gives it, for the float network's outputs. A share of the
    images is held out: the log says how near each MLP comes on them, and if the whole network, rounded to nearest, is
    no nearer to the float network there than with GELU, everything is put back, and the log says that.

    Attributes:
        iterations: steps for each MLP.
        lr: relative to the size of the weights.
        batch: rows (tokens) of a step.
        held: share of the calibration images that are held out.
        seed: of the choice of images and rows.
        memory: gigabytes of outputs of blocks that are held in memory; beyond it, in temporary files.

    Raises:
        PlanishError: an option has no meaning, or the network has taps already.
    """

    iterations: int = 500
    lr: float = 0.02
    batch: int = 1024
    held: float = 0.25
    seed: int = 0
    memory: float = 4.0
    name = "replace-gelu"

    def __post_init__(self) -> None:
        check_memory(self.name, self.memory)
        Tuning(held=self.held)  # which says what is wrong with it
        for option in ("iterations", "batch"):
            if getattr(self, option) < 1:
                raise PlanishError(f"{self.name}: {option} is {getattr(self, option)}: give at least 1")
        if not 0 < self.lr < math.inf:
            raise PlanishError(f"{self.name}: lr is {self.lr}: give a number above 0")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        require_float(calibration, self.name)
        model = calibration.model
        mlps = find_mlps(model, first_image(calibration.batches[0]))
        if not mlps:
            calibration.note(self.name, "the network has no GELU between two linear layers, so nothing was changed")
            return
        guard = Tuning(held=self.held, seed=self.seed)
        fit, held = guard.parts(calibration, torch.Generator().manual_seed(self.seed))
        trial = replace(calibration, model=copy.deepcopy(model), float_twin=None)
        self._reconstruct(trial, mlps, fit, held)
        before, after = (guard.distance(rounded_copy(one)[0].model, held) for one in (calibration, trial))
        text = f"distance of the rounded network from the float one on held-out images {before:.4g} -> {after:.4g}"
        if not after < before:
            calibration.note(self.name, f"{text}; that is not lower, so every GELU stays")
            return
        put_relu(model, paths=[mlp.gelu for mlp in mlps])
        model.load_state_dict(trial.model.state_dict())
        calibration.plan_anew()
        calibration.note(self.name, f"{text}; the GELU of {len(mlps)} MLPs is a ReLU now, which is another network")

    def _reconstruct(self, trial: Calibration, mlps: Sequence[MLP], fit: Images, held: Images) -> None:
        """Put ReLUs into the network and fit the layers around them, MLP by MLP."""
        model, twin = trial.model, copy.deepcopy(trial.model)
        put_relu(model, paths=[mlp.gelu for mlp in mlps])
        of_site = {f"{mlp.first}.weight": mlp for mlp in mlps}
        size = max(1, size_of(trial.batches[0]))
        parts = [fit[rows].inputs for rows in torch.arange(len(fit)).split(size)]

        def decide(site: str, calls: Iterable[tuple[LayerCall, ...]]) -> None:
            mlp = of_site[site]
            exact = [twin.get_submodule(path) for path in (mlp.first, mlp.gelu, mlp.second)]
            xs, ys = [], []
            for here, there in calls:
                xs.append(here.args["input"].flatten(0, -2))
                ys.append(exact[2](exact[1](exact[0](there.args["input"]))).flatten(0, -2))
            layers: list[Any] = [model.get_submodule(path) for path in (mlp.first, mlp.second)]
            tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
            before, (x, y) = relative_error(tensors, xs[-1], ys[-1]), (torch.cat(xs[:-1]), torch.cat(ys[:-1]))
            fitted = reconstruct_mlp(
                tensors, x, y, iterations=self.iterations, lr=self.lr, batch=self.batch, seed=self.seed
            )
            for tensor, value in zip(tensors, fitted, strict=True):
                tensor.copy_(value)
            after = relative_error(tensors, xs[-1], ys[-1])
            text = f"{mlp.gelu}: error of the MLP with ReLU on held-out images {before:.3g} -> {after:.3g} of the"
            trial.note(self.name, f"{text} variance of its output")

        batches = [*parts, held.inputs]  # the last one judges
        visit_layers([model, twin], trial.assignment.products, batches, of_site, decide, memory=self.memory)
