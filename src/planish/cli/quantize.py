"""``planish quantize``."""

from __future__ import annotations

from typing import Any

import torch

from planish.cli.files import check_target
from planish.cli.options import Quantize
from planish.network import ledger
from planish.ptq import quantize
from planish.ptq.files import save_quantized, weights_megabytes
from planish.recipes.check import check_run
from planish.recipes.config import RunConfig
from planish.recipes.material import prepare
from planish.recipes.processes import is_main, make_console
from planish.recipes.session import free_cores, say


def execute(command: Quantize) -> None:
    """Quantize, print what became of every site, and write the file."""
    config = RunConfig(
        arms=("given",),
        schemes=(command.scheme,),
        methods=(command.method,),
        models=command.models,
        quantize=command.quantize,
    )
    config = check_run(config)
    check_target(command.out, command.overwrite)
    console = make_console()
    torch.set_num_threads(command.models.threads or free_cores())
    material = prepare(config, console)

    def log(event: dict[str, Any]) -> None:
        agreement = 100 * event["after"]["agreement"]
        say(console, f"{event['pass']}: agrees with the float network on {agreement:.1f} %, {event['seconds']:.2f} s")

    scheme, method, loaded = config.schemes[0], command.method, material.loaded
    model = quantize(loaded.model, material.calibration, scheme, method, allow=command.quantize.allow, log=log)
    console.print()
    console.print(str(ledger(model)), markup=False, highlight=False, no_wrap=True, crop=False, overflow="ignore")
    console.print()
    protocol = {
        "model": loaded.name, "checkpoint": loaded.weights_hash, "data": material.data.name, "method": method,
        "calibration_images": material.calibration_images, "calibration_seed": command.models.seed,
    }  # fmt: skip
    if is_main():
        save_quantized(model, command.out, loaded.recipe, loaded.preprocessing, protocol)
    size = weights_megabytes(model)
    say(
        console,
        f"{command.out}: {scheme} by {method}; {size:.3f} MB of weights at their bits (this file stores them in float)",
    )
