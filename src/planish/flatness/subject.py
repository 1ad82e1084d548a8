"""A float network made ready to be looked at: every site has a switch, and the grids that it would be rounded to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Assignment, Product, Site, assign, attach, fold_batchnorm, watch
from planish.network.batches import call_model, first_image, logits_of, split_batch, to_device
from planish.network.faults import sound
from planish.ptq.grids import watch_grids
from planish.ptq.sensitivity import Switch
from planish.quantizers import UniformQuantizer
from planish.scheme import Scheme
from planish.task import CLASSES, task_of

Batch = tuple[Any, Tensor]  # inputs and labels


@dataclass
class Subject:
    """A copy of a network as its quantizer sees it: BatchNorm folded, in evaluation mode, in float.

    Attributes:
        model: the copy. With no tap switched in it computes what the given network computes in evaluation mode.
        batches: labelled images. Where the loader has no labels, they are the network's own answers.
        products: its matrix products in the order of execution.
        assignments, quantizers: for each scheme the plan, and a fitted quantizer (calibrated rounding, ``rtn``) by the
            name of its site; sites that stay in float are missing.
        labelled: whether the labels came from the loader.
    """

    model: nn.Module
    batches: list[Batch]
    products: tuple[Product, ...]
    assignments: dict[str, Assignment]
    quantizers: dict[str, dict[str, UniformQuantizer]]
    labelled: bool = True
    switches: dict[str, Switch] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        schemes: Sequence[Scheme | str],
        *,
        calibration: Iterable[Any] | None = None,
        allow: Iterable[str] = (),
    ) -> Subject:
        """Fold a copy of ``model``, set the ranges of every scheme, and put a switch at every site.

        Args:
            model: a trained classifier in float; it is left untouched.
            batches: images, or (images, labels), to look at the network on.
            schemes: the schemes whose grids are wanted, at least one.
            calibration: images on which the ranges are set; default: ``batches``.
            allow: shell patterns of products that may stay in float.

        Raises:
            PlanishError: no batch, no scheme, or what :func:`planish.quantize` raises.

        The quantizers are those of ``planish.quantize(model, calibration, scheme, "rtn")``; here the network is
        watched once for all schemes.
        """
        if task_of(model) is not CLASSES:
            raise PlanishError(
                f"a diagnosis looks at the cross-entropy of classes, and the outputs of this {type(model).__name__} "
                f"are {task_of(model).name}: compare planish.evaluate before and after instead"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        split = [split_batch(to_device(batch, device)) for batch in sound(batches, "diagnosis")]
        if not split or not schemes:
            raise PlanishError("there is nothing to look at: pass at least one batch of images and one scheme")
        inputs = [x for x, _ in split]
        calibration = (
            inputs
            if calibration is None
            else [split_batch(to_device(b, device))[0] for b in sound(calibration, "calibration")]
        )
        twin = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batchnorm(twin, calibration[0])  # as the first pass of every method does
        allow = (allow,) if isinstance(allow, str) else tuple(allow)
        watched = watch(twin, first_image(inputs[0]))
        plans = {scheme.name: assign(watched, scheme, allow=allow) for scheme in map(Scheme.parse, schemes)}
        quantizers = _fit(twin, plans, calibration)
        products = next(iter(plans.values())).products
        labelled = all(labels is not None for _, labels in split)
        subject = cls(twin, [], products, plans, quantizers, labelled)
        subject.batches = [(x, y if labelled else subject._answers(x)) for x, y in split]  # type: ignore[misc]
        subject.attach_switches()
        return subject

    def attach_switches(self) -> None:
        """Put a fresh switch at every site (whatever was there before is gone)."""
        self.switches = attach(self.model, self.products, lambda site: Switch())  # type: ignore[assignment]

    @property
    def sites(self) -> list[Site]:
        """Every site once, in the order of execution."""
        return list({site.name: site for product in self.products for site in product.sites}.values())

    @property
    def images(self) -> int:
        return sum(len(labels) for _, labels in self.batches)

    @contextmanager
    def tapped(self, taps: Mapping[str, nn.Module]) -> Iterator[None]:
        """While this is open, ``taps`` (by the name of their site) are switched in, over those that were.

        >>> with subject.tapped(subject.quantizers["w4a4"]):
        ...     subject.losses().mean()  # of the network rounded to w4a4
        """
        before = {name: self.switches[name].quantizer for name in taps}
        for name, tap in taps.items():
            self.switches[name].quantizer = tap
        try:
            yield
        finally:
            for name, tap in before.items():  # type: ignore[assignment]
                self.switches[name].quantizer = tap

    def grids(self, scheme: str, *, weights: bool = True, activations: bool = True) -> dict[str, UniformQuantizer]:
        """The quantizers of a scheme, of weights, of activations, or of both.

        Raises:
            PlanishError: the subject was not prepared for this scheme.
        """
        if scheme not in self.quantizers:
            raise PlanishError(
                f"scheme {scheme!r} has no quantizers here: prepare the subject with it (it has "
                f"{', '.join(self.quantizers)})"
            )
        is_weight = {site.name: site.is_weight for site in self.sites}
        wanted = {True: weights, False: activations}
        return {name: tap for name, tap in self.quantizers[scheme].items() if wanted[is_weight[name]]}

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch] | None = None) -> Tensor:
        """Logits of all images under the taps that are switched in; (images, classes), float32, on the CPU."""
        found = [logits_of(call_model(self.model, x)).float().cpu() for x, _ in batches or self.batches]
        return torch.cat(found)

    def losses(self, batches: Sequence[Batch] | None = None) -> Tensor:
        """Cross-entropy of every image in nats, under the taps that are switched in; (images,), on the CPU."""
        labels = torch.cat([y for _, y in batches or self.batches]).cpu()
        return F.cross_entropy(self.logits(batches), labels, reduction="none")

    @torch.no_grad()
    def _answers(self, inputs: Any) -> Tensor:
        return logits_of(call_model(self.model, inputs)).argmax(-1)


def _fit(
    model: nn.Module, plans: Mapping[str, Assignment], calibration: Sequence[Any]
) -> dict[str, dict[str, UniformQuantizer]]:
    """Calibrated rounding's quantizers for every scheme."""
    fitted: dict[str, dict[str, UniformQuantizer]] = {name: {} for name in plans}
    alike: dict[Any, list[str]] = {}  # schemes that differ in nothing but widths are watched for together
    for name, plan in plans.items():
        key = frozenset((site.name, replace(fmt, bits=8)) for site, fmt in plan.quantized())
        alike.setdefault(key, []).append(name)
    for names in alike.values():
        first = plans[names[0]]
        fit = watch_grids(model, first.products, {s.name: fmt for s, fmt in first.quantized()}, calibration)
        for name in names:
            fitted[name] = {site.name: fit(site, fmt) for site, fmt in plans[name].quantized()}
    return fitted
