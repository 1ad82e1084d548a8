"""Run by test_two_processes.py in two processes: commands on the tiny network, one of them interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from planish.cli.main import main
from planish.recipes.work import Work

RANK = int(os.environ["RANK"])
STOP_AFTER = 4  # steps of the flat arm, which has 2 epochs of 6


def interrupt_flat(work: Work, share: float) -> None:
    """A signal reaches one process only; both have to stop."""
    if "under the measured errors" in work._text:
        work.steps = getattr(work, "steps", 0) + 1
        if work.steps == STOP_AFTER and RANK == 1:
            signal.raise_signal(signal.SIGINT)  # handled by this thread, at once


def commands(folder: Path) -> dict[str, int]:
    options = ["--model", f"{folder / 'tiny.py'}:build", "--data", str(folder / "data"), "--batch-size", "4",
               "--threads", "1"]  # fmt: skip
    run = ["run", *options, "--arms", "given,averaged,flat", "--methods", "rtn", "--schemes", "w4a4", "--epochs", "2",
           "--activation-noise", "gaussian"]  # fmt: skip  # of which each process draws its own
    found = {"whole": main([*run, "--out", "whole"]), "again": main([*run, "--out", "whole"])}
    at = Work.at
    Work.at = interrupt_flat
    found["interrupted"] = main([*run, "--out", "broken"])
    Work.at = at
    if RANK == 0:
        shutil.copytree(".broken.partial", ".left.partial")
    found["resumed"] = main(["run", "--resume", "--out", "broken", "--trust"])
    found["flatten"] = main(["flatten", *options, "--epochs", "1", "--out", "flat.safetensors"])
    found["quantize"] = main(["quantize", *options, "--weights", "flat.safetensors", "--out", "small.safetensors"])
    found["train"] = main(
        ["train", *options, "--method", "kd", "--start", "flat", "--epochs", "2", "--out", "trained.safetensors"]
    )
    torch.distributed.barrier()  # the files are there
    found["evaluate"] = main(["evaluate", "small.safetensors", *options[2:], "--trust"])
    found["evaluate trained"] = main(["evaluate", "trained.safetensors", *options[2:], "--trust"])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit SIG_IGN
    os.chdir(sys.argv[1])
    print("\n" + json.dumps(commands(Path(sys.argv[1]))))
