"""Run by test_several_processes.py: forks 1, 2 and 4 processes and prints what each of them found."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch.utils.data import DataLoader, TensorDataset

from planish.errors import PlanishError
from planish.evaluation import evaluate, predict
from planish.flattening import ActivationNoise, FlattenSettings, WeightNoise, flatten
from planish.ptq import quantize
from planish.ptq.reconstruction import Reconstruct
from planish.ptq.rounding import Calibrate, FoldBatchNorm, Round
from planish.qat import QATSettings, train_quantized
from planish.training import SAM, Averaging, Ingredient, Interrupted, TrainingFailed, make_accelerator
from planish.training.sharding import asked_for, is_split
from tests.processes import fork
from tests.training import tiny

WORLDS = (1, 2, 4)
METHODS = ("kd", "fpq", "cr", "mec", "freeze", "saq", "gplq")
FROZEN = tiny.settings(freeze_batchnorm=True)
ONE = replace(FROZEN, epochs=1)


def numbers(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()]).tolist()


def uneven(shuffle=True):
    """Batches of 6, 6, 6 and 2: four processes share them unevenly, and two of them get nothing of the last one."""
    return tiny.loader(n=20, batch=6, shuffle=shuffle)


class Recorded(Ingredient):
    def __init__(self, noise):
        self.noise = noise

    def after_step(self, run):
        self.values = [
            [
                *map(float, (t.recorder.step, t.recorder.grid.zero_point, t.recorder.variance, t.recorder.nonzero)),
                t.level.sigma,
            ]
            for t in self.noise.taps.values()
        ]


def trainings():
    found, log = {}, []
    losses = []
    model = tiny.conv()
    for _ in range(2):  # the second time, it is a model that was trained before
        tiny.fit(model, [Averaging(0.9)], uneven(), run_settings=FROZEN, progress=lambda *a: losses.append(a[-1]))
    found["plain"], found["losses"] = numbers(model), losses
    for name, parts in {"whole": 1, "parts": 2}.items():
        model = tiny.conv()
        tiny.fit(model, [SAM(0.1)], uneven(), run_settings=replace(FROZEN, accumulation=parts))
        found[name] = numbers(model)
    stock = tiny.conv()
    tiny.fit(stock, [], DataLoader(tiny.data(20), 6, shuffle=True), run_settings=FROZEN)  # by the global generator
    listed = tiny.conv()
    tiny.fit(listed, [], list(uneven(shuffle=False)), run_settings=FROZEN)
    found |= {"stock": numbers(stock), "list": numbers(listed)}

    norms = tiny.conv()
    tiny.fit(norms, [SAM(0.1)], uneven(), run_settings=tiny.settings(epochs=2))  # BatchNorm is not frozen
    found["norms"] = numbers(norms)
    kinds = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), BatchNormAct2d(4), torch.nn.Conv2d(4, 4, 3),
        torch.nn.BatchNorm2d(4, affine=False, track_running_stats=False), torch.nn.Conv2d(4, 4, 3),
        torch.nn.BatchNorm2d(4, momentum=None), torch.nn.Flatten(), torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4),
    )  # fmt: skip
    with torch.no_grad():
        for i, parameter in enumerate(kinds.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 3)
    tiny.fit(kinds, [], uneven(), run_settings=tiny.settings(epochs=1))
    found["kinds"] = numbers(kinds)

    noisy = tiny.conv()
    noise = ActivationNoise(tiny.plan(noisy), refresh=2)
    recorded = Recorded(noise)
    terms = [WeightNoise(tiny.plan(noisy), "iid"), noise, recorded]
    tiny.fit(noisy, terms, tiny.loader(n=32, batch=8), run_settings=FROZEN, log=log.append)
    found["noisy"], found["recorded"] = numbers(noisy), recorded.values
    found["seeds"] = [event for event in log if event["event"] in ("seeds", "noise")]
    return found


def flattenings():
    clip = FlattenSettings(weight_noise="none", activation_noise="none", clip_weights=True, training=ONE)
    off = replace(clip, clip_weights=False, clip_activations=False)
    weights = replace(off, weight_noise="residual")  # which draws the same in every process
    rounded = FlattenSettings(training=tiny.settings(epochs=1))
    found = {}
    for name, settings in {"clip": clip, "off": off, "weights": weights, "rounded": rounded}.items():
        found[name] = numbers(flatten(tiny.conv(), uneven(), settings=settings))
    found["attention"] = numbers(flatten(tiny.vit(), tiny.loader(n=16, size=16, batch=8), settings=rounded))
    return found


def quantized():
    calibration = [tiny.data(seed=1).tensors[0][i : i + 8] for i in (0, 8, 16)]
    settings = QATSettings(averaging=0.9, training=ONE)
    options = {"calibration": calibration, "settings": settings}
    found = {"lsq": numbers(train_quantized(tiny.conv(), uneven(), "w4a4", "lsq", **options))}
    free = options | {"settings": replace(options["settings"], training=replace(ONE, freeze_batchnorm=False))}
    found["lsq, norms"] = numbers(train_quantized(tiny.conv(), uneven(), "w4a4", "lsq", **free))
    for method in METHODS if make_accelerator().num_processes == 2 else ():
        found[method] = numbers(train_quantized(tiny.conv(), uneven(), "w4a4", method, **options))
    found["ranges"] = numbers(quantize(tiny.conv(), calibration, "w4a4"))
    qdrop = [FoldBatchNorm(), Calibrate(), Round(), Reconstruct(iterations=10, batch=8)]
    found["qdrop"] = numbers(quantize(tiny.conv(), calibration, "w2a4", qdrop))
    return found


def evaluations():
    images, labels = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 4
    found = {"evaluation": evaluate(torch.nn.Identity(), DataLoader(TensorDataset(images, labels), 2))}
    found["listed"] = evaluate(torch.nn.Identity(), [(images, labels)])
    logits, _, _ = predict(torch.nn.Identity(), DataLoader(TensorDataset(images, labels), 2))
    return {**found, "ordered": torch.equal(logits, images)}


def failures():
    rank, world = int(os.environ.get("RANK", "0")), make_accelerator().num_processes
    found, steps = {}, []
    bad = tiny.data()
    bad.tensors[0][1] = float("nan")  # in the part of one process only
    try:
        tiny.fit(tiny.mlp(), [], DataLoader(bad, 4))
    except TrainingFailed as error:
        found["failed"] = str(error)[:28]
    try:
        tiny.fit(
            tiny.mlp(), [], tiny.loader(), progress=lambda step, *_: steps.append(step),
            should_stop=lambda: rank == world - 1 and len(steps) == 2,
        )  # fmt: skip
    except Interrupted:
        found["stopped"] = steps[-1]
    unused = tiny.mlp()
    unused.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))
    try:
        tiny.fit(unused)
    except PlanishError as error:
        found["unused"] = str(error)
    return found


def main():
    return {
        "world": make_accelerator().num_processes, **trainings(), **flattenings(), **quantized(), **evaluations(),
        **failures(),
    }  # fmt: skip


class Split(Ingredient):
    """Looks whether the weights are split in the steps."""

    sharded = True
    seen = False

    def after_step(self, run):
        self.seen = all(is_split(p) for p in run.model.parameters())


def split(folder):
    """What FSDP2 does, or one process without it."""
    found, rank = {}, int(os.environ.get("RANK", "0"))
    model, look = tiny.conv(), Split()
    before = [(id(p), type(m), sorted(vars(m))) for m in model.modules() for p in m.parameters()]
    terms = lambda: [SAM(0.1), Averaging(0.9)]  # noqa: E731
    short = replace(ONE, accumulation=2, clip_norm=0.1)
    tiny.fit(model, [*terms(), look], uneven(), run_settings=short)
    found["sam"], found["seen"] = numbers(model), look.seen
    found["as before"] = before == [(id(p), type(m), sorted(vars(m))) for m in model.modules() for p in m.parameters()]

    for optimizer in ("sgd", "adamw"):  # interrupted and continued
        settings = replace(short, optimizer=optimizer, lr=0.01)
        place, steps = folder / f"{optimizer}{os.environ.get('WORLD_SIZE', 1)}", []
        parts, again, whole = tiny.conv(), tiny.conv(seed=5), tiny.conv()
        noise = lambda: [WeightNoise(tiny.plan(whole), "differential-forward"), *terms()]  # noqa: B023, E731
        tiny.fit(whole, noise(), uneven(), run_settings=settings)
        options = {"run_settings": settings, "checkpoint_dir": place}
        try:
            tiny.fit(
                parts, noise(), uneven(), **options, progress=lambda *a: steps.append(a),  # noqa: B023
                should_stop=lambda: len(steps) == 3,  # noqa: B023
            )  # fmt: skip
        except Interrupted:
            tiny.fit(again, noise(), uneven(), **options, resume=True)
        found[f"resumed {optimizer}"] = tiny.same(whole, again)
        found[optimizer] = numbers(whole)
    found["checkpoint"] = sum(t.numel() for t in load_file(place / "state.safetensors").values())

    bare = FlattenSettings(activation_noise="none", training=ONE)
    for name, settings in {
        "residual": bare,
        "clipped": replace(bare, weight_noise="iid", activation_noise="none"),
    }.items():
        found[name] = numbers(flatten(tiny.conv(), uneven(), settings=settings))
    found["flat"] = len(numbers(flatten(tiny.vit(), tiny.loader(n=16, size=16, batch=8), epochs=1)))
    for method in ("lsq", "pact", "ofq", "gplq", "freeze"):
        try:
            options = {"calibration": [tiny.data(seed=1).tensors[0]], "settings": QATSettings(training=ONE)}
            found[method] = numbers(train_quantized(tiny.conv(), uneven(), "w4a4", method, **options))
        except PlanishError as error:
            found[method] = str(error)
    bad = tiny.data()
    bad.tensors[0][13] = float("nan")
    try:
        tiny.fit(model, [], DataLoader(bad, 6), run_settings=FROZEN)
    except TrainingFailed as error:
        found["good"] = all(torch.equal(v, error.state_dict[k]) for k, v in model.state_dict().items())
    if rank == 0:
        os.environ["FSDP_VERSION"] = "1"
        try:
            asked_for(make_accelerator())
        except PlanishError as error:
            found["first"] = str(error)
    return found


if __name__ == "__main__":
    found = {world: fork(main, world) for world in WORLDS}
    with TemporaryDirectory() as folder:
        splitting = partial(split, Path(folder))
        found["whole"] = fork(splitting, 1)
        found["split"] = fork(splitting, 2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    print(json.dumps(found))
