"""planish, in the environment that it is installed in."""

from __future__ import annotations

from functools import partial

from judge import Answer, Task, main

import planish
from planish.ptq import get_method, with_settings


def run(method: str, task: Task) -> Answer:
    """A method by its name, as `planish quantize` runs it."""
    passes = with_settings(get_method(method).passes(), seed=task.seed)
    return planish.quantize(task.model, task.batches, f"w{task.weights}a{task.activations}", passes)


if __name__ == "__main__":
    main({name: partial(run, name) for name in ("fast", "best-cnn", "best-vit", "rtn")}, ("planish",))
