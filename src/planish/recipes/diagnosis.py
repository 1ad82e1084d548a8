"""``planish diagnose``: one or several networks looked at in the same way, into a run folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Subset

from planish.data import calibration_subset, make_loader
from planish.errors import PlanishError
from planish.evaluation import predict, worth
from planish.flatness.advice import SPARED, about_bits, about_parts, about_products, spare
from planish.flatness.perturbations import chosen
from planish.flatness.subject import Subject
from planish.models import fit_weights, read_weights
from planish.network import watch
from planish.recipes.check import check_models
from planish.recipes.config import DiagnosisConfig, RunConfig, flat_dict
from planish.recipes.effort import effort_for
from planish.recipes.material import Material, prepare
from planish.recipes.processes import make_console
from planish.recipes.session import StopFlag, free_cores, stoppable
from planish.recipes.stages import STAGES, Look, run_stage
from planish.recipes.work import Work
from planish.report.environment import environment
from planish.report.folder import RunFolder
from planish.report.html import write_report
from planish.report.plain import to_plain
from planish.scheme import Scheme

WORST = 5  # products for which 8 bits are tried


def check_diagnosis(config: DiagnosisConfig) -> DiagnosisConfig:
    """The same settings with the schemes' names spelled as planish spells them; raises PlanishError for bad ones."""
    check_models(config.models)
    if config.images < 0:
        raise PlanishError(f"images is {config.images}: give at least 1, or 0 to let the size of the network decide")
    scheme, schemes = Scheme.parse(config.scheme).name, [Scheme.parse(s).name for s in config.schemes]
    return replace(config, scheme=scheme, schemes=tuple(dict.fromkeys([*schemes, scheme])))


def diagnose(
    config: DiagnosisConfig,
    networks: Mapping[str, Path | None],
    folder: RunFolder,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Look at every network and leave ``results.json`` and ``report.html`` in the folder.

    Args:
        networks: by the name of the arm, a file of weights that fit the model of ``config``, or ``None`` for its own.
        folder: a new run, an interrupted one, or a finished one, whose rows stay as they are. Every stage that is
            done is kept in it at once, and not done again.

    Raises:
        PlanishError: anything wrong with the input, in one sentence.
        KeyboardInterrupt: stopped by the user; what is done is in the folder.
    """
    console = console or make_console()
    with stoppable() as stop:
        torch.set_num_threads(config.models.threads or free_cores())
        material = prepare(RunConfig(models=config.models), console, calibrate=False)
        done = _Diagnosis(config, networks, folder, material, stop)
        with Work(done.plan(), console) as work:
            return done.walk(work)


class _Diagnosis:
    def __init__(
        self,
        config: DiagnosisConfig,
        networks: Mapping[str, Path | None],
        folder: RunFolder,
        material: Material,
        stop: StopFlag,
    ) -> None:
        self.config, self.networks = config, networks
        self.scheme, self.schemes = config.scheme, list(config.schemes)
        self.folder, self.material, self.stop = folder, material, stop
        data, seed = material.data, config.models.seed
        example = torch.zeros(1, *material.loaded.preprocessing.input_size, device=material.device)
        macs = sum(product.macs for product in watch(material.loaded.model, example).products)
        self.effort = effort_for(macs, config.images)
        self.calibration = self._train_images(min(self.effort.calibration_images, len(data.train_labels)))
        self.images = self._train_images(min(self.effort.images, len(data.train_labels)))
        count = min(self.effort.test_images, len(data.test))  # type: ignore[arg-type]
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[arg-type]
        size = config.models.batch_size
        self.test = make_loader(Subset(data.test, sorted(order[:count])), size, shuffle=False, seed=0)
        corrupted = sorted(order[: min(count, self.effort.corrupted_images)])
        self.corrupted = make_loader(Subset(data.test, corrupted), size, shuffle=False, seed=0)
        self.test_images = count
        self.settings = {
            **flat_dict(config), "networks": sorted(networks), "checkpoint": material.loaded.weights_hash,
        }  # fmt: skip
        known = folder.read_results() if folder.path("results.json").exists() else {"rows": []}
        self.results: dict[str, Any] = known
        flatness = known.setdefault("flatness", {})
        if flatness.get("settings") != _plain(self.settings):
            flatness.clear()
        self.flatness: dict[str, Any] = flatness
        self.reference: Tensor | None = None

    def _train_images(self, count: int) -> Any:
        data, options = self.material.data, self.config.models
        subset = calibration_subset(data.train, data.train_labels, count, options.seed)
        size = min(options.batch_size, 64 if self.effort.images < 512 else options.batch_size)
        return make_loader(subset, size, shuffle=False, seed=0)

    def plan(self) -> list[tuple[str, float]]:
        """Every stage of every network, with what it costs."""
        one = [("rows", 3.0), *((name, cost) for name, (_, cost, _) in STAGES.items())]
        return [*one * len(self.networks), ("advice", 1.0)]

    def walk(self, work: Work) -> dict[str, Any]:
        self.flatness.setdefault("settings", _plain(self.settings))
        self.flatness.update(scheme=self.scheme, images=self.effort.layer_images, effort=asdict(self.effort))
        self.flatness.setdefault("networks", {})
        for name, path in self.networks.items():
            self._network(name, self._load(name, path), work)
        work.begin("what to do next")
        if "advice" not in self.flatness:
            name, path = next(iter(self.networks.items()))
            self.flatness["advice"] = self._advice(name, self._subject(self._load(name, path)))
        work.end()
        self._write()
        write_report(self.results, self.folder.path("report.html"))
        return self.results

    def _load(self, name: str, path: Path | None) -> nn.Module:
        given = self.material.loaded.model
        if path is None:
            return given
        model = copy.deepcopy(given)
        fit_weights(model, read_weights(path)[0], name=name, source=path)
        return model.to(self.material.device).eval()

    def _subject(self, model: nn.Module) -> Subject:
        schemes = dict.fromkeys([*self.schemes, SPARED])
        return Subject.prepare(model, self.images, list(schemes), calibration=self.calibration, allow=self.config.allow)

    def _network(self, name: str, model: nn.Module, work: Work) -> None:
        found = self.flatness["networks"].setdefault(name, {})
        subject: Subject | None = None
        work.begin(f"{name}: at {', '.join(self.schemes)}")
        rows = [row for row in self.results["rows"] if row["arm"] == name]
        missing = [stage for stage in STAGES if stage not in found]
        if missing or not rows:
            subject = self._subject(model)
            self.flatness["labelled"] = subject.labelled
            logits = self._logits(subject)
            if not rows:
                self.results["rows"] += self._rows(name, logits)
                self._write()
        work.end(measured=subject is not None)
        for stage, (title, _, _) in STAGES.items():
            work.begin(f"{name}: {title}")
            if stage in missing:
                assert subject is not None
                few = chosen(subject, self.effort.layer_images)
                found |= {"fp_top1": self._fp_top1(logits), "loss": subject.losses(few).mean().item()}
                found[stage] = run_stage(stage, self._look(subject, logits, work))
                self._write()
            work.end(measured=stage in missing)
            self.stop.check()
        self._fill_measured(name, found)

    def _logits(self, subject: Subject) -> dict[str, Tensor]:
        """Logits of the test images by scheme, ``fp32`` among them, and the labels."""
        logits: dict[str, Tensor] = {}
        for scheme in ("fp32", *self.schemes):
            with subject.tapped({} if scheme == "fp32" else subject.quantizers[scheme]):
                logits[scheme], logits["labels"], _ = predict(subject.model, self.test)
            self.stop.check()
        return logits

    def _fp_top1(self, logits: dict[str, Tensor]) -> float:
        return (logits["fp32"].argmax(-1) == logits["labels"]).float().mean().item()

    def _look(self, subject: Subject, logits: dict[str, Tensor], work: Work) -> Look:
        material = self.material

        def progress(share: float) -> None:
            self.stop.check()
            work.at(share)

        return Look(
            subject=subject, scheme=self.scheme, schemes=self.schemes, effort=self.effort,
            seed=self.config.models.seed, fp_top1=self._fp_top1(logits), float_logits=logits["fp32"],
            low_logits=logits[self.scheme], labels=logits["labels"], classes=material.classes,
            corrupted=self.corrupted, preprocessing=material.loaded.preprocessing, progress=progress,
        )  # fmt: skip

    def _rows(self, name: str, logits: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Rows of results.json for calibrated rounding."""
        labels = logits["labels"]
        self.reference = logits["fp32"] if self.reference is None else self.reference
        rows = []
        for scheme in ("fp32", *self.schemes):
            figures = worth(logits[scheme], labels, self.reference)
            rows.append({
                "arm": name, "scheme": scheme, "method": "none" if scheme == "fp32" else "rtn",
                "seed": self.config.models.seed, "fp_top1": self._fp_top1(logits), **figures,
            })  # fmt: skip
        return rows

    def _fill_measured(self, name: str, found: dict[str, Any]) -> None:
        """Put beside each prediction what rounding really gave."""
        measured = {
            row["scheme"]: row["top1"]
            for row in self.results["rows"]
            if row["arm"] == name and row["method"] == "rtn" and row.get("top1") is not None
        }
        for prediction in found["prediction"]:
            prediction["measured_top1"] = measured.get(prediction["scheme"])

    def _advice(self, name: str, subject: Subject) -> list[dict[str, Any]]:
        """What to do with the first network, and how the others compare."""
        found = self.flatness["networks"][name]
        split, few = found["split"], self.effort.images
        worst = sorted(split["layers"], key=lambda layer: layer["both"], reverse=True)
        low: dict[str, Any] = subject.grids(self.scheme)
        few_bits = {
            p.name for p in subject.products if any(s.name in low and low[s.name].format.bits < 8 for s in p.sites)
        }
        worst = [layer["product"] for layer in worst if layer["product"] in few_bits][:WORST]
        top1 = [(p["scheme"], p["measured_top1"]) for p in found["prediction"] if p["measured_top1"] is not None]
        advice = [about_bits(found["fp_top1"], top1)] if top1 else []
        advice.append(about_parts(self.scheme, split["weights"], split["activations"], split["interaction"]))
        advice += about_products(spare(subject, self.scheme, worst), few)
        return [asdict(one) for one in advice]

    def _write(self) -> None:
        loaded, data, options = self.material.loaded, self.material.data, self.config.models
        effort = self.effort
        card = {
            "model": loaded.name, "checkpoint": loaded.weights_hash, "data": data.name,
            "test_images": self.test_images, "calibration_images": effort.calibration_images,
            "calibration_seed": options.seed, "images_looked_at": effort.images,
            "images_layer_by_layer": effort.layer_images, "images_corrupted": effort.corrupted_images,
            "looked_at_scheme": self.scheme, "seed": options.seed, "batch_size": options.batch_size,
            "threads": torch.get_num_threads(), "device": str(self.material.device),
            f"scheme_{self.scheme}": Scheme.parse(self.scheme).describe().partition(": ")[2],
            **{f"network_{name}": str(path) if path else "its own weights" for name, path in self.networks.items()},
        }  # fmt: skip
        self.results.setdefault("protocol", card)
        self.results.setdefault("environment", environment(self.material.device))
        self.folder.write_results(self.results)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, without those on which no number depends."""
    return {key: value for key, value in to_plain(settings).items() if key not in ("threads", "workers")}
