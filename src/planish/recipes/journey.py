"""``planish run``: given -> arms -> schemes -> methods -> evaluation -> run folder."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from planish.deploy.checkpoint import save as save_checkpoint
from planish.errors import NotWritten, PlanishError
from planish.evaluation import evaluate, predict
from planish.flattening import FlattenSettings
from planish.models import fit_weights, read_weights, save_weights
from planish.network import ledger, weights_megabytes
from planish.ptq import quantize
from planish.recipes.arms import ARMS, arm_settings
from planish.recipes.check import check_run
from planish.recipes.config import FREE, RunConfig, flat_dict
from planish.recipes.estimate import plain_step, tell, worth_it
from planish.recipes.material import Material, prepare, tell_replaced
from planish.recipes.passes import chosen_passes, learning_cost
from planish.recipes.processes import count_processes, is_main, make_console, on_main
from planish.recipes.session import StopFlag, free_cores, say, stoppable
from planish.recipes.tracking import Tracking
from planish.recipes.trained import train_arm
from planish.recipes.work import Work
from planish.report.environment import environment, peak_memory_mb, protocol_card
from planish.report.files import short
from planish.report.folder import RunFolder
from planish.report.html import write_report
from planish.report.summary import outcome, summarize
from planish.report.table import print_table
from planish.scheme import Scheme

IN_FLOAT = "normalization, softmax, activation functions, additions"
EVALUATION_COST = 0.35  # of one image in evaluation, in training images
CALIBRATION_COST = 2.0  # of one calibration image: it passes through the network before and after each pass


def run(config: RunConfig, out: Path, *, resume: bool = False, console: Console | None = None) -> Path:
    """The whole journey; returns the run folder. See :class:`RunConfig`.

    Of several processes (``accelerate launch``) each takes batches of its own in training and evaluation, and the main
    one prints and writes.

    Raises:
        PlanishError: anything wrong with the input, in one sentence. Nothing is left behind if nothing was done yet.
        KeyboardInterrupt: stopped by the user; ``resume=True`` continues to the identical result.
    """
    console = console or make_console()
    config = check_run(config)
    with stoppable() as stop:
        folder = on_main(lambda: RunFolder.open(out, resume))
        folder.active = is_main()
        try:
            config = _with_threads(config, folder)
            torch.set_num_threads(config.models.threads)
            material = prepare(config, console)
            settings = {**flat_dict(config), **material.fingerprint()}
            on_main(lambda: folder.write_config(settings, may_differ=("resume", "out", *FREE)))
            if material.data.skipped:
                folder.log({"event": "images skipped", "reasons": material.data.skipped})
        except BaseException:
            if folder.active and not resume:
                shutil.rmtree(folder.partial, ignore_errors=True)
            raise
        journey = _Journey(config, folder, material, console, stop)
        with journey.tracked(settings):
            results = journey.walk()
        folder.write_results(results)
        if folder.active:
            write_report(results, folder.path("report.html"))
            shutil.rmtree(folder.path("checkpoint"), ignore_errors=True)
        final = folder.finish()
    _conclude(results, final, console)
    return final


def _conclude(results: dict[str, Any], final: Path, console: Console) -> None:
    console.print()
    protocol_card(results["protocol"], console)
    console.print()
    print_table(results["rows"], console)
    console.print()
    say(console, outcome(summarize(results["rows"])))
    say(console, f"report: {short(final / 'report.html')}")


def _with_threads(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Fix the number of threads: sums are rounded by it, so a resumed run takes the number that it began with."""
    threads = config.models.threads
    if not threads and folder.resumed:
        threads = on_main(lambda: int(folder.read_config().get("threads", 0)))
    return replace(config, models=replace(config.models, threads=threads or free_cores()))


class _Journey:
    def __init__(
        self, config: RunConfig, folder: RunFolder, material: Material, console: Console, stop: StopFlag
    ) -> None:
        self.config, self.folder, self.material, self.stop = config, folder, material, stop
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.replaced: dict[str, Any] = {}
        if folder.resumed and folder.path("results.json").exists():
            previous = folder.read_results()
            self.rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in previous["rows"]]
            self.seconds = previous["protocol"].get("seconds_training", {})
            self.replaced = {k: v for k, v in previous["protocol"].items() if k == "images_replaced"}
        self.work = Work(self._plan(), console)
        self.tracking: Tracking | None = None

    @contextmanager
    def tracked(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the trackers that were asked for hear every event."""
        known = {**settings, **{k: v for k, v in self.protocol().items() if v is not None}}
        names, place, console = self.config.record.track, self.folder.path("tracking"), self.work.console
        with Tracking(names, place, self.folder.final.name, known, lambda text: say(console, text)) as self.tracking:
            yield

    def tell(self, event: Mapping[str, Any]) -> None:
        """A line of the log, which trackers hear, too."""
        self.folder.log(event)
        if self.tracking is not None:
            self.tracking(event)

    def _plan(self) -> list[tuple[str, float]]:
        """The stages and their cost in training images."""
        images = len(self.material.data.train_labels) * self.config.train.epochs
        tests = EVALUATION_COST * self.material.test_images
        one = tests + CALIBRATION_COST * self.material.calibration_images
        options = self.config.quantize
        quantized = [(f"quantize by {m}", one + learning_cost(m, options)) for m in self.config.methods]
        plan = [("test", tests)]
        for arm in self.config.arms:
            plan += [("train", ARMS[arm].cost * images), ("test", tests), *quantized * len(self.config.schemes)]
        return plan

    def walk(self) -> dict[str, Any]:
        given = self.material.loaded.model
        _ = self.ledger  # a product that no tap reaches, or a pattern that matches nothing, is an error before training
        self._estimate()
        with self.work:
            self.work.begin("the given network on the test images")
            reference, _, _ = predict(given, self.material.test, progress=self._each_batch)
            self.work.end()
            for arm in self.config.arms:
                model = self.arm(arm, given)
                fp = self.measure(arm, model, reference)
                for scheme in self.config.schemes:
                    for method in self.config.methods:
                        self.measure(arm, model, reference, scheme, method, fp)
        return self.results()

    def _estimate(self) -> None:
        """Say what the whole run will take, unless it goes on with one that was interrupted."""
        config, material = self.config, self.material
        trained = [arm_settings(a, config.train, config.noise, config.models.seed) for a in config.arms]
        settings = next((one for one in trained if one is not None), None)
        if settings is None or self.folder.resumed or not worth_it(material, config.train.epochs):
            return
        images = sum(cost for _, cost in self.work.plan)
        steps = images / config.models.batch_size
        step = plain_step(material, settings.training)
        tell(self.work.console, material, config.train.epochs, step, steps, count_processes())

    def _each_share(self, share: float) -> None:
        self.stop.check()
        self.work.at(share)

    def _each_batch(self, done: int, batches: int) -> None:
        self.stop.check()
        self.work.at(done / batches if batches else 0.0)

    def arm(self, name: str, given: nn.Module) -> nn.Module:
        """The network of an arm: from its file if it is there, else trained (and then in its file)."""
        path = self.folder.path(f"{name}.safetensors")
        self.work.begin(f"{name}: {ARMS[name].summary}")
        settings = arm_settings(name, self.config.train, self.config.noise, self.config.models.seed)
        known = on_main(path.exists)
        if known:
            model = copy.deepcopy(given)
            fit_weights(model, read_weights(path)[0], name=name, source=path)
        elif settings is None:
            model = copy.deepcopy(given)
            if self.folder.active:
                save_weights(model, path)
        else:
            model = self._train(name, settings, path)
        self.work.end(measured=not known)
        self.stop.check()
        return model.eval()

    def _train(self, name: str, settings: FlattenSettings, path: Path) -> nn.Module:
        checkpoint = self.folder.path("checkpoint") / name
        continued = checkpoint.exists()
        began = time.perf_counter()
        try:
            model = train_arm(
                self.material, self.config.prepare, settings, allow=self.config.quantize.allow, checkpoint=checkpoint,
                resume=self.folder.resumed, stop=self.stop, progress=self.work.at,
                last_good=self.folder.path(f"{name}-last-good.safetensors"),
                checkpoint_minutes=self.config.record.checkpoint_minutes,
                log=lambda event: self.tell({"arm": name, **event}),
            )  # fmt: skip
        except NotWritten as error:
            raise NotWritten(f"{name}: {error}") from error
        except PlanishError as error:
            raise PlanishError(f"{name}: {error}; what was done before is kept in {self.folder.partial}") from None
        self.replaced = tell_replaced(self.material, self.work.console) or self.replaced
        if not continued:  # of a continued training the first part was not timed
            self.seconds[name] = round(time.perf_counter() - began, 2)
        if self.folder.active:
            save_weights(model, path)
            shutil.rmtree(checkpoint, ignore_errors=True)
        return model

    def measure(
        self,
        arm: str,
        model: nn.Module,
        reference: Tensor,
        scheme: str = "fp32",
        method: str = "none",
        fp: float | None = None,
    ) -> float:
        """Quantize (unless ``fp32``), evaluate, add a row; returns the top-1. A row that is there already is kept."""
        key = {"arm": arm, "scheme": scheme, "method": method, "seed": self.config.models.seed}
        known = next((row for row in self.rows if all(row[k] == v for k, v in key.items())), None)
        self.work.begin(f"{arm}: {scheme}" + ("" if method == "none" else f" by {method}"))
        if known is not None:
            self.work.end(measured=False)
            return known["top1"]
        began = time.perf_counter()
        unfinished = self.folder.path("checkpoint") / f"{arm}-{scheme}-{method}"  # of a method that learns for long
        if scheme != "fp32":
            model = quantize(
                model, self.material.calibration, scheme,
                chosen_passes(method, self.config.quantize, self.config.models.seed),
                allow=self.config.quantize.allow, log=lambda event: self.tell({**key, **event}),
                progress=self._each_share, checkpoint_dir=unfinished, resume=self.folder.resumed,
            )  # fmt: skip
            if self.folder.active:
                self._save(model, f"{arm}-{scheme}-{method}.safetensors", key)
        seconds = time.perf_counter() - began
        worth = evaluate(model, self.material.test, reference=reference, progress=self._each_batch)
        row = {
            **key, "fp_top1": fp if fp is not None else worth["top1"], "top1": worth["top1"], "nll": worth["nll"],
            "ece": worth["ece"], "flip_rate": worth["flip_rate"],
            "seconds": round(seconds, 3) if scheme != "fp32" else self.seconds.get(arm),
            "peak_memory_mb": peak_memory_mb(self.material.device), "weights_mb": round(weights_megabytes(model), 4),
        }  # fmt: skip
        self.rows.append({k: v for k, v in row.items() if v is not None})
        self.tell({"event": "result", **self.rows[-1]})
        self.folder.write_results(self.results())
        if self.folder.active:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.work.end()
        return worth["top1"]

    def _save(self, model: nn.Module, name: str, key: dict[str, Any]) -> None:
        classes = self.material.classes
        save_checkpoint(model, self.folder.path(name), protocol={**self.protocol(), **key}, classes=classes)

    def protocol(self) -> dict[str, Any]:
        """All that the numbers depend on."""
        config, loaded, data = self.config, self.material.loaded, self.material.data
        trained = [arm for arm in config.arms if ARMS[arm].cost]
        labelled = [arm for arm in trained if arm != "flat" or config.noise.labels]
        processes = count_processes()
        fp = next((r["top1"] for r in self.rows if r["arm"] == "given" and r["scheme"] == "fp32"), None)
        schemes = dict.fromkeys((*config.schemes, *(config.prepare if "flat" in trained else ())))
        flat = arm_settings("flat", config.train, config.noise, config.models.seed) if "flat" in trained else None
        return {
            "model": loaded.name, "checkpoint": loaded.weights_hash, "fp_top1": fp, "data": data.name,
            "test_images": self.material.test_images, "train_images": len(data.train_labels) if trained else None,
            "labels_used": len(data.train_labels) if labelled else 0,
            "epochs": config.train.epochs if trained else None,
            "flat_prepared_for": ", ".join(config.prepare) if "flat" in trained else None,
            "weight_noise": config.noise.weight_noise if "flat" in trained else None,
            "activation_noise": config.noise.activation_noise if "flat" in trained else None,
            "calibration_images": self.material.calibration_images, "calibration_seed": config.models.seed,
            "noise": flat and (
                f"{flat.share:.0%} of the steps until {flat.until:.0%} of the run, {flat.part:.0%} of the weights and "
                f"{flat.activation_part:.0%} of the layers, averaging {flat.averaging}"
            ),
            "flat_labels": config.noise.labels if flat and config.noise.labels != 1 else None,
            "flat_batch_statistics": True if flat and config.noise.batch_statistics else None,
            "distillation": config.noise.distillation or None, "output_error": config.noise.output_error or None,
            "optimizer": config.train.optimizer if trained else None,
            "learning_rate": (config.train.lr or "default of the optimizer") if trained else None,
            "precision": config.train.mixed_precision if trained else None,
            "accumulation": config.train.accumulation if trained and config.train.accumulation > 1 else None,
            "compiled": True if trained and config.train.compile else None,
            **{f"scheme_{name}": Scheme.parse(name).describe().partition(": ")[2] for name in schemes},
            "in_float": ", ".join((IN_FLOAT, *config.quantize.allow)),
            "seed": config.models.seed, "batch_size": config.models.batch_size, "threads": config.models.threads,
            "processes": processes if processes > 1 else None, "device": str(self.material.device),
            "seconds_training": self.seconds or None, "images_skipped": len(data.skipped) or None, **self.replaced,
        }  # fmt: skip

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        """What the first scheme makes of the network, site by site."""
        if not self.config.schemes:
            return []
        loaded = self.material.loaded
        example = torch.zeros(1, *loaded.preprocessing.input_size, device=self.material.device)
        return ledger(
            loaded.model, self.config.schemes[0], example=example, allow=self.config.quantize.allow
        ).as_dicts()

    def results(self) -> dict[str, Any]:
        """The content of results.json, as far as it is known."""
        return {
            "protocol": {k: v for k, v in self.protocol().items() if v is not None},
            "environment": environment(self.material.device),
            "rows": self.rows,
            "flatness": {},
            "ledger": self.ledger,
        }
