"""``planish diagnose``: one or several networks looked at in the same way, into a run folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.evaluation import predict, worth
from planish.flatness.advice import SPARED, Spared, about_bits, about_others, about_parts, about_products, spare
from planish.flatness.perturbations import chosen
from planish.flatness.subject import Subject
from planish.models import fit_weights, read_weights
from planish.network import watch
from planish.recipes.check import check_models
from planish.recipes.config import DiagnosisConfig, RunConfig, flat_dict
from planish.recipes.effort import effort_for
from planish.recipes.headline import headline
from planish.recipes.looked_at import LookedAt
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
        example = torch.zeros(1, *material.loaded.preprocessing.input_size, device=material.device)
        macs = sum(product.macs for product in watch(material.loaded.model, example).products)
        self.effort = effort_for(macs, config.images)
        self.looked_at = LookedAt.choose(material, self.effort, config.models)
        self.settings = {
            **flat_dict(config), "networks": sorted(networks), "checkpoint": material.loaded.weights_hash,
        }  # fmt: skip
        known = folder.read_results() if folder.path("results.json").exists() else {"rows": []}
        self.results: dict[str, Any] = known
        flatness = known.setdefault("flatness", {})
        if flatness.get("settings") != _plain(self.settings):
            flatness.clear()
        self.flatness: dict[str, Any] = flatness

    def plan(self) -> list[tuple[str, float]]:
        """Every stage of every network, with what it costs."""
        one = [("rows", 3.0), *((name, cost) for name, (_, cost, _) in STAGES.items())]
        return [*one * len(self.networks), ("advice", 1.0)]

    def walk(self, work: Work) -> dict[str, Any]:
        self.flatness.setdefault("settings", _plain(self.settings))
        self.flatness.update(scheme=self.scheme, effort=asdict(self.effort))
        self.flatness.setdefault("networks", {})
        for name, path in self.networks.items():
            self._network(name, self._load(name, path), work)
        work.begin("what to do next")
        self.flatness["advice"] = self._advice(next(iter(self.networks)))
        self.flatness["headline"] = headline(self.scheme, self.flatness["networks"])
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
        seen = self.looked_at
        return Subject.prepare(model, seen.images, list(schemes), calibration=seen.calibration, allow=self.config.allow)

    def _network(self, name: str, model: nn.Module, work: Work) -> None:
        found = self.flatness["networks"].setdefault(name, {})
        subject: Subject | None = None
        work.begin(f"{name}: at {', '.join(self.schemes)}")
        rows = [row for row in self.results["rows"] if row["arm"] == name]
        missing = [stage for stage in (*STAGES, "spared") if stage not in found]
        if missing or not rows:
            subject = self._subject(model)
            images = min(subject.images, self.effort.layer_images)
            self.flatness.update(labelled=subject.labelled, images=images)
            logits = self._logits(subject, [self.scheme] if rows else self.schemes)
            few = chosen(subject, self.effort.layer_images)
            found |= {"fp_top1": self._fp_top1(logits), "loss": subject.losses(few).mean().item()}
            if not rows:
                self.results["rows"] += self._rows(name, logits)
                self._write()
        work.end(measured=subject is not None)
        for stage, (title, _, _) in STAGES.items():
            work.begin(f"{name}: {title}")
            if stage in missing:
                assert subject is not None
                found[stage] = run_stage(stage, self._look(subject, logits, work))
                self._write()
            work.end(measured=stage in missing)
            self.stop.check()
        if subject is not None and "spared" not in found:
            found["spared"] = self._spare(found["split"], subject)
        self._fill_measured(name, found)

    def _logits(self, subject: Subject, schemes: list[str]) -> dict[str, Tensor]:
        """Logits of the test images in float (``fp32``) and by scheme, and the labels."""
        logits: dict[str, Tensor] = {}
        for scheme in ("fp32", *schemes):
            with subject.tapped({} if scheme == "fp32" else subject.quantizers[scheme]):
                logits[scheme], logits["labels"], _ = predict(subject.model, self.looked_at.test)
            self.stop.check()
        return logits

    @cached_property
    def reference(self) -> Tensor:
        """Logits of the given network on the test images, against which flips are counted."""
        return predict(self.material.loaded.model, self.looked_at.test)[0]

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
            corrupted=self.looked_at.corrupted, preprocessing=material.loaded.preprocessing, progress=progress,
        )  # fmt: skip

    def _rows(self, name: str, logits: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Rows of results.json for calibrated rounding."""
        rows = []
        for scheme in ("fp32", *self.schemes):
            figures = worth(logits[scheme], logits["labels"], self.reference)
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

    def _spare(self, split: dict[str, Any], subject: Subject) -> list[dict[str, Any]]:
        """The products that lose most by themselves, of those at fewer than 8 bits, each lifted to 8."""
        low: dict[str, Any] = subject.grids(self.scheme)
        few_bits = {
            p.name for p in subject.products if any(s.name in low and low[s.name].format.bits < 8 for s in p.sites)
        }
        worst = sorted(split["layers"], key=lambda layer: layer["both"], reverse=True)
        names = [layer["product"] for layer in worst if layer["product"] in few_bits][:WORST]
        return [asdict(one) for one in spare(subject, self.scheme, names)]

    def _advice(self, name: str) -> list[dict[str, Any]]:
        """What to do with the first network, and how the others compare."""
        found = self.flatness["networks"][name]
        split = found["split"]
        top1 = [(p["scheme"], p["measured_top1"]) for p in found["prediction"] if p["measured_top1"] is not None]
        advice = [about_bits(found["fp_top1"], top1)] if top1 else []
        advice.append(about_parts(self.scheme, split["weights"], split["activations"], split["interaction"]))
        images = len(self.looked_at.images.dataset)  # type: ignore[arg-type]
        advice += about_products([Spared(**one) for one in found["spared"]], images)
        rows = {(row["arm"], row["scheme"]): row for row in self.results["rows"] if row["method"] == "rtn"}
        both = [(n, rows.get((n, self.scheme))) for n in self.networks]
        advice += about_others(self.scheme, {n: (row["fp_top1"], row["top1"]) for n, row in both if row})
        return [asdict(one) for one in advice]

    def _write(self) -> None:
        if "protocol" not in self.results:
            self.results["protocol"] = self._protocol()
        if "environment" not in self.results:
            self.results["environment"] = environment(self.material.device)
        self.folder.write_results(self.results)

    def _protocol(self) -> dict[str, Any]:
        """All that the numbers depend on."""
        loaded, data, options = self.material.loaded, self.material.data, self.config.models
        counts = {name: len(getattr(self.looked_at, name).dataset) for name in ("calibration", "images", "corrupted")}
        return {
            "model": loaded.name, "checkpoint": loaded.weights_hash, "data": data.name,
            "test_images": self.looked_at.test_images, "calibration_images": counts["calibration"],
            "calibration_seed": options.seed, "images_looked_at": counts["images"],
            "images_layer_by_layer": min(counts["images"], self.effort.layer_images),
            "images_corrupted": counts["corrupted"],
            "looked_at_scheme": self.scheme, "seed": options.seed, "batch_size": options.batch_size,
            "threads": torch.get_num_threads(), "device": str(self.material.device),
            f"scheme_{self.scheme}": Scheme.parse(self.scheme).describe().partition(": ")[2],
            **{f"network_{name}": str(path) if path else "its own weights" for name, path in self.networks.items()},
        }  # fmt: skip


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, without those on which no number depends."""
    return {key: value for key, value in to_plain(settings).items() if key not in ("threads", "workers")}
