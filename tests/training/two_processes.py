"""Run by test_two_processes.py in two processes, which print what they found, and in the process of the test."""

from __future__ import annotations

import json
import os

import torch
from torch.utils.data import DataLoader, TensorDataset

from planish.evaluation import evaluate, predict
from planish.flattening import ActivationNoise, FlattenSettings, WeightNoise, flatten
from planish.qat import QATSettings, train_quantized
from planish.training import Ingredient, Interrupted, TrainingFailed, make_accelerator
from tests.training import tiny


def numbers(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()]).tolist()


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


def main():
    rank = int(os.environ.get("RANK", "0"))
    world = make_accelerator().num_processes
    found = {"world": world}

    model = tiny.mlp()
    for _ in range(2):  # the second time, it is a model that was trained before
        tiny.fit(model, [], tiny.loader(n=32, batch=8 // world))
    found["plain"] = numbers(model)

    noisy = tiny.conv()
    noise = ActivationNoise(tiny.plan(noisy), refresh=2)
    recorded = Recorded(noise)
    tiny.fit(noisy, [WeightNoise(tiny.plan(noisy), "iid"), noise, recorded], tiny.loader(n=32, batch=8 // world))
    found["noisy"], found["recorded"] = numbers(noisy), recorded.values

    settings = FlattenSettings(training=tiny.settings(epochs=1), reestimate_batches=2)
    batches = DataLoader(tiny.data(), 4 // world, shuffle=True)  # shuffled by the global generator
    found["flat"] = numbers(flatten(tiny.conv(), batches, settings=settings))

    trained = QATSettings(averaging=0.9, training=tiny.settings(epochs=1))
    for method in ("kd", "fpq", "cr", "mec", "freeze"):
        model = train_quantized(tiny.conv(), tiny.loader(n=32, batch=8 // world), "w4a4", method, settings=trained)
        found[method] = numbers(model)

    images, labels = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 4
    found["evaluation"] = evaluate(torch.nn.Identity(), DataLoader(TensorDataset(images, labels), 2))
    found["listed"] = evaluate(torch.nn.Identity(), [(images, labels)])
    logits, _, _ = predict(torch.nn.Identity(), DataLoader(TensorDataset(images, labels), 2))
    found["ordered"] = torch.equal(logits, images)

    bad = tiny.data()
    bad.tensors[0][1] = float("nan")  # in a batch of one process only
    try:
        tiny.fit(tiny.mlp(), [], DataLoader(bad, 4 // world))
    except TrainingFailed as error:
        found["failed"] = str(error)[:40]
    steps = []
    try:
        tiny.fit(
            tiny.mlp(), [], tiny.loader(), progress=lambda step, *_: steps.append(step),
            should_stop=lambda: rank == world - 1 and len(steps) == 2,
        )  # fmt: skip
    except Interrupted:
        found["stopped"] = steps[-1]
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
