"""``planish quantize``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from planish.cli.ended import saying_what_is_kept
from planish.cli.files import check_beside, check_target
from planish.cli.options import Quantize, named
from planish.deploy.checkpoint import save
from planish.errors import PlanishError
from planish.network import ledger, weights_megabytes
from planish.ptq import quantize
from planish.ptq.assign_bits import AssignBits, limit_of, with_bits
from planish.ptq.budget import Budget, say_cost
from planish.ptq.widths import total_bit_operations
from planish.recipes.check import check_run
from planish.recipes.config import RunConfig, flat_dict
from planish.recipes.kept import Kept, log_beside
from planish.recipes.material import Sample, prepare_sample
from planish.recipes.passes import chosen_passes
from planish.recipes.processes import is_main, make_console
from planish.recipes.session import free_cores, say, stoppable
from planish.recipes.work import Work, duration
from planish.task import FEATURES, check_task, task_of


def execute(command: Quantize) -> None:
    """Quantize, print what became of every site, and write the file; an interrupted one goes on when it is given again.

    What a method learns is kept unit by unit until the file is written.
    """
    command = replace(command, models=named(command.network, command.models), network="")
    config = RunConfig(
        arms=("given",),
        schemes=(command.scheme,),
        methods=(command.method,),
        models=command.models,
        quantize=command.quantize,
    )
    config = check_run(config)
    check_target(command.out, command.overwrite)
    bits = _assign_bits(command)
    console, kept = make_console(), Kept(command.out)
    before = kept.before()
    check_beside(command.out, log_beside(command.out), "the log", command.overwrite, bool(before))
    threads = command.models.threads or int(before.get("threads", 0)) or free_cores()
    command = replace(command, models=replace(command.models, threads=threads))
    torch.set_num_threads(threads)
    check_task(command.task)
    with stoppable():
        sample = prepare_sample(config, console, unlabelled=command.unlabelled, task=command.task)
        now = {**flat_dict(command), **sample.found}
        kept.begin(now)
        with (
            saying_what_is_kept(kept.describe, command.models.batch_size), kept.interruptible(),
            kept.tracked((), now, console) as tell,
        ):  # fmt: skip
            _quantize(command, config.schemes[0], sample, bits, kept, console, tell)
    kept.drop()


def _quantize(
    command: Quantize, scheme: str, sample: Sample, bits: AssignBits | None, kept: Kept, console: Console,
    tell: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    method, loaded = command.method, sample.loaded
    passes = chosen_passes(method, command.quantize, command.models.seed)
    if command.quantize.iterations is not None and not any(hasattr(step, "iterations") for step in passes):
        say(console, f"note: {method} learns nothing, so --iterations changes nothing")
    if bits is not None:
        passes = with_bits(passes, bits)

    def log(event: dict[str, Any]) -> None:
        tell(event)
        _say(console, event)

    with Work([(method, 1.0)], console) as work:
        verb = "going on with " if kept.holds_state() else ""
        work.begin(f"{verb}{loaded.name} at {scheme} by {method}")
        model = quantize(
            loaded.model, sample.calibration, scheme, passes, allow=command.quantize.allow,
            checkpoint_dir=kept.state, resume=True, log=log, progress=work.at,
        )  # fmt: skip
        work.end()
    console.print()
    table = ledger(model)
    console.print(str(table), markup=False, highlight=False, no_wrap=True, crop=False, overflow="ignore")
    console.print()
    protocol = {
        "model": loaded.name, "checkpoint": loaded.weights_hash, "data": sample.source, "method": method,
        "calibration_images": sample.images, "calibration_seed": command.models.seed,
    }  # fmt: skip
    if bits is not None:
        protocol |= {"budget": bits.budget, "budget_activations": bits.activations}
    kept.finish_log()
    if is_main():
        names = None if task_of(model) is FEATURES else sample.classes
        save(model, command.out, protocol=protocol, classes=names)
    what = scheme if bits is None else " and ".join(table.shares)
    say(console, f"{command.out}: {what} by {method}; {weights_megabytes(model):.3f} MB of weights at their bits")
    if bits is not None:
        say(console, _spent(Budget.parse(bits.budget), loaded.model, model))


def _assign_bits(command: Quantize) -> AssignBits | None:
    """The pass that keeps to the budget of a command; ``None`` without one."""
    if command.budget is not None:
        return AssignBits(command.budget, activations=command.budget_activations)
    if command.budget_activations:
        raise PlanishError("budget-activations needs a budget of bit operations: give --budget, such as 2.5Gbops")
    return None


def _spent(budget: Budget, given: nn.Module, model: nn.Module) -> str:
    """What of a budget is used; passes after the choice of bits may have added parameters."""
    plan: Any = model.planish_assignment
    kind, limit = limit_of(budget, given)
    spent = {"bytes": 1e6 * weights_megabytes(model), "bops": total_bit_operations(plan)}
    over = spent[kind] * (8 if kind == "bytes" else 1) > limit
    line = f"of a budget of {budget.describe()}: {say_cost(spent['bytes'], 'bytes')}, {say_cost(spent['bops'], 'bops')}"
    return line + " for one image" + ("; over the budget by what the method has added to the network" if over else "")


def _say(console: Console, event: dict[str, Any]) -> None:
    """A line for what a pass has to say."""
    kind, name = event["event"], event["pass"]
    if kind == "pass":
        agreement = 100 * event["after"]["agreement"]
        say(console, f"{name}: agrees with the float network on {agreement:.1f} %, {duration(event['seconds'])}")
    elif kind == "estimate":
        more = event["megabytes"] - event["held_megabytes"]
        disk = f", {more:.0f} MB of them on disk" if more > 0 else ""
        about = duration(event["seconds"])
        say(console, f"{name}: {event['units']} units, about {about}, {event['megabytes']:.0f} MB of caches{disk}")
    elif kind == "note":
        say(console, f"{name}: note: {event['text']}")
