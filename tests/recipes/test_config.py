"""Settings: to config.toml and back, the arms, and what is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planish.cli.options import Run
from planish.errors import PlanishError
from planish.recipes.arms import ARMS, arm_settings, training_settings
from planish.recipes.check import MAX_SEED, check_run
from planish.recipes.config import (
    FREE,
    ModelOptions,
    NoiseOptions,
    RecordOptions,
    RunConfig,
    TrainOptions,
    flat_dict,
    from_flat_dict,
)
from planish.report.folder import RunFolder
from planish.training import TrainingSettings
from planish.training.engine import step_seed


def test_settings_survive_the_file(tmp_path):
    config = RunConfig(
        arms=("flat",), models=ModelOptions(data=Path("a/b"), threads=3), train=TrainOptions(lr=0.5, epochs=7)
    )
    run = RunFolder.open(tmp_path / "run")
    run.write_config({**flat_dict(config), "checkpoint": "00"})
    assert from_flat_dict(RunConfig, run.read_config()) == config
    assert from_flat_dict(RunConfig, flat_dict(RunConfig())) == RunConfig()
    older = {k: v for k, v in flat_dict(config).items() if k not in FREE}  # on which no number depends
    assert from_flat_dict(RunConfig, older) == config
    with pytest.raises(KeyError, match="epochs"):
        from_flat_dict(RunConfig, {k: v for k, v in flat_dict(config).items() if k != "epochs"})


def test_no_two_settings_share_a_name():
    assert len(flat_dict(RunConfig())) == 4 + sum(
        len(part.__dataclass_fields__)
        for part in (ModelOptions, TrainOptions, NoiseOptions, type(RunConfig().quantize), RecordOptions)
    )


def test_commas_and_repetitions():
    assert Run(arms=("given,flat", "flat", "sam,")).arms == ("given", "flat", "sam")


def test_schemes_get_planishs_spelling():
    assert check_run(RunConfig(schemes=("W4A4", "w4a4", "w3"), prepare=("W2A4",))).schemes == ("w4a4", "w3")
    assert check_run(RunConfig(prepare=("W2A4",))).prepare == ("w2a4",)
    assert check_run(RunConfig(schemes=("W4A4",))).prepare == ("w4a4",)
    with pytest.raises(PlanishError, match="no scheme to flatten for"):
        check_run(RunConfig(schemes=()))


def test_the_largest_seed_still_fits():
    step_seed(MAX_SEED, 10**6, 100).to_bytes(8, "little")
    config = RunConfig(models=ModelOptions(seed=MAX_SEED + 1))
    with pytest.raises(PlanishError, match="seed is"):
        check_run(config)
    check_run(replace(config, models=ModelOptions(seed=MAX_SEED)))


def test_every_arm_has_settings_of_the_same_budget():
    train = TrainOptions(epochs=3, lr=0.1)
    for arm in ARMS:
        settings = arm_settings(arm, train, NoiseOptions(), 5)
        assert (settings is None) == (arm == "given")
        if settings is not None:
            assert (settings.training.epochs, settings.training.lr, settings.training.seed) == (3, 0.1, 5)
    with pytest.raises(PlanishError, match="'none' is not known: choose from given"):
        arm_settings("none", train, NoiseOptions(), 0)


def test_options_of_training_are_those_of_the_loop():
    assert training_settings(TrainOptions(epochs=4), 0) == TrainingSettings()  # but for the epochs
    options = TrainOptions(weight_decay=0.0, warmup=0.5, final_lr=0.1)
    for arm in ARMS:
        settings = arm_settings(arm, options, NoiseOptions(), 5)
        if settings is not None:
            training = settings.training
            assert (training.weight_decay, training.warmup, training.final_lr) == (0.0, 0.5, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weight_decay": -1.0}, "weight-decay is -1.0"), ({"warmup": 1.5}, "warmup is 1.5"),
     ({"final_lr": float("nan")}, "final-lr is nan")],
)  # fmt: skip
def test_rates_that_cannot_be(options, message):
    with pytest.raises(PlanishError, match=message):
        check_run(RunConfig(train=TrainOptions(**options)))


def test_what_the_flat_arm_learns_from_and_how_it_normalizes():
    train = TrainOptions()
    usual = arm_settings("flat", train, NoiseOptions(), 0)
    assert (usual.task, usual.distillation, usual.training.freeze_batchnorm) == (1.0, 0.0, True)
    noise = NoiseOptions(labels=0.0, distillation=1.0, batch_statistics=True)
    other = arm_settings("flat", train, noise, 0)
    assert (other.task, other.distillation, other.training.freeze_batchnorm) == (0.0, 1.0, False)
    assert arm_settings("averaged", train, noise, 0) == arm_settings("averaged", train, NoiseOptions(), 0)
