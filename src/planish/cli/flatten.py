"""``planish flatten``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from planish.cli.ended import saying_what_is_kept
from planish.cli.files import check_beside, check_target
from planish.cli.options import Flatten, named
from planish.models import save_weights
from planish.recipes.arms import ARMS, arm_settings
from planish.recipes.check import check_models, check_record, check_training
from planish.recipes.config import RunConfig, flat_dict
from planish.recipes.estimate import plain_step, tell, worth_it
from planish.recipes.kept import Kept, log_beside
from planish.recipes.material import prepare, tell_replaced
from planish.recipes.processes import count_processes, is_main, make_console, on_main
from planish.recipes.session import free_cores, say, stoppable
from planish.recipes.trained import train_arm
from planish.recipes.work import Work
from planish.scheme import Scheme


def execute(command: Flatten) -> None:
    """Train, and write the float weights; an interrupted training goes on when the command is given again."""
    command = replace(command, models=named(command.network, command.models), network="")
    Scheme.parse(command.scheme)
    check_models(command.models)
    check_training(command.train, command.noise)
    command = replace(command, record=check_record(command.record))
    check_target(command.out, command.overwrite)
    console = make_console()
    kept = Kept(command.out)
    before = kept.before()
    check_beside(command.out, log_beside(command.out), "the log", command.overwrite, bool(before))
    threads = command.models.threads or int(before.get("threads", 0)) or free_cores()
    command = replace(command, models=replace(command.models, threads=threads))
    torch.set_num_threads(threads)
    settings = arm_settings("flat", command.train, command.noise, command.models.seed)
    assert settings is not None
    with stoppable() as stop:
        config = RunConfig(models=command.models, train=command.train)
        material = prepare(config, console, calibrate=False)
        loaded = material.loaded
        if command.noise.batch_statistics and not any(isinstance(m, _BatchNorm) for m in loaded.model.modules()):
            say(console, f"note: {loaded.name} has no BatchNorm, so --batch-statistics changes nothing")
        now = {**flat_dict(command), **material.fingerprint()}
        kept.begin(now)
        going_on = on_main(kept.state.exists)
        if not going_on and worth_it(material, command.train.epochs):
            steps = ARMS["flat"].cost * command.train.epochs * len(material.train)
            with kept.interruptible():  # what the first steps refuse leaves nothing behind
                step = plain_step(material, settings.training)
            tell(console, material, command.train.epochs, step, steps, count_processes())
        with (
            saying_what_is_kept(kept.describe, command.models.batch_size), kept.interruptible(),
            kept.tracked(command.record.track, now, console) as log, Work([("train", 1.0)], console) as work,
        ):  # fmt: skip
            work.begin(f"{'going on with' if going_on else 'flattening'} {material.loaded.name} for {command.scheme}")
            flat = train_arm(
                material, (command.scheme,), settings, allow=command.allow, checkpoint=kept.state, resume=True,
                stop=stop, progress=work.at, last_good=kept.last_good, log=log,
                checkpoint_minutes=command.record.checkpoint_minutes,
            )  # fmt: skip
            work.end()
            tell_replaced(material, console)
            kept.finish_log()
            if is_main():
                save_weights(flat, command.out, {"format": "pt"})
    kept.drop()
    say(
        console,
        f"{command.out}: {command.train.epochs} epochs in {work.elapsed:.0f} s; use it with --weights {command.out}",
    )
