"""Run by test_presence.py in two processes: a run is resumed, and done again from its beginning."""

import sys

import torch

from planish.cli.main import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, options = sys.argv[1], sys.argv[2:]
    resumed = main(["run", "--resume", "--out", f"{folder}/killed", "--trust"])
    sys.exit(resumed or main(["run", *options, "--out", f"{folder}/whole"]))
