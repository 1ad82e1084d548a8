import errno
import json
from dataclasses import asdict

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError

from planish.errors import PlanishError
from planish.flattening import ActivationNoise, WeightNoise
from planish.training import Averaging, checkpoint, make_accelerator
from tests.training import tiny


def trained(directory, seed=0, **options):
    model = tiny.conv(seed)
    plan = tiny.plan(model)
    noise = [WeightNoise(plan, "differential-forward"), ActivationNoise(plan), Averaging(0.9)]
    tiny.fit(
        model, noise, run_settings=tiny.settings(epochs=options.pop("epochs", 1)), checkpoint_dir=directory, **options
    )
    return model


def test_files_are_safetensors_and_json(tmp_path):
    trained(tmp_path / "c")
    files = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert files == ["state.json", "state.safetensors"]
    json.loads((tmp_path / "c/state.json").read_text())
    header = (tmp_path / "c/state.safetensors").read_bytes()
    assert header[8:9] == b"{"  # length, then JSON: no pickle
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_nested_state_round_trip():
    state = {"a": torch.arange(3), "b": [1, 2.5, None, {"c": torch.ones(2)[::1]}], 4: (torch.zeros(()), "x")}
    tensors = {}
    tree = json.loads(json.dumps(checkpoint.flatten_state(state, "", tensors)))
    back = checkpoint.restore_state(tree, tensors)
    assert torch.equal(back["a"], state["a"])
    assert back["b"][:3] == [1, 2.5, None]
    assert torch.equal(back["b"][3]["c"], torch.ones(2))
    assert torch.equal(back[4][0], torch.zeros(()))
    assert len(tensors) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, error):
    first = trained(tmp_path / "c")

    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(PlanishError, match=r"the disk is full: make room; the previous one is kept"):
            trained(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    again = trained(tmp_path / "c", seed=4, resume=True)
    assert tiny.same(first, again)


def test_a_crash_between_the_two_moves_loses_nothing(tmp_path):
    first = trained(tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / "c.old")
    assert checkpoint.exists(tmp_path / "c")
    assert tiny.same(first, trained(tmp_path / "c", seed=4, resume=True))


@pytest.mark.parametrize("damage", ["cut", "json", "missing", "other model", "other ingredients", "other kind"])
def test_damaged_checkpoint_gets_a_sentence(tmp_path, damage):
    trained(tmp_path / "c")
    tensors, values = tmp_path / "c/state.safetensors", tmp_path / "c/state.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "json":
        values.write_text(values.read_text()[:-5])
    elif damage == "missing":
        tensors.unlink()
    model = tiny.mlp() if damage == "other model" else tiny.conv()
    plan = tiny.plan(model)
    ingredients = [WeightNoise(plan), ActivationNoise(plan), Averaging(0.9)]
    if damage == "other ingredients":
        ingredients.pop()
    if damage == "other kind":
        ingredients.reverse()
    with pytest.raises(PlanishError, match=r"cannot be continued from .*delete it to start over"):
        tiny.fit(model, ingredients, checkpoint_dir=tmp_path / "c", resume=True, run_settings=tiny.settings(epochs=1))
    assert not any("planish_taps" in name for name, _ in model.named_modules())


def prepared(scaler=None):
    accelerator, model = make_accelerator(), tiny.mlp()
    return model, AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler), [], accelerator


def test_the_scale_of_the_losses_goes_on_where_it_was(tmp_path):
    def scaler():  # fp16 is for accelerators only, its scaler is not
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    model, optimizer, ingredients, accelerator = prepared(scaler())
    for _ in range(3):  # the scale has grown once, and is half way to the next time
        optimizer.scaler.scale(model(torch.randn(2, 64)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(tmp_path / "c", model, optimizer, ingredients, accelerator, 3)
    model, again, ingredients, _ = prepared(scaler())
    assert checkpoint.load(tmp_path / "c", model, again, ingredients) == 3
    assert again.scaler.state_dict() == optimizer.scaler.state_dict()
    assert again.scaler.get_scale() == 2048.0
    assert again.scaler.state_dict()["_growth_tracker"] == 1
    model, plain, ingredients, _ = prepared()
    assert checkpoint.load(tmp_path / "c", model, plain, ingredients) == 3


def test_other_settings_are_refused_by_name(tmp_path):
    run = prepared()
    settings = {**asdict(tiny.settings()), "steps": 12}
    checkpoint.save(tmp_path / "c", *run, 5, settings=settings)
    assert checkpoint.load(tmp_path / "c", *run[:3], settings=settings) == 5
    assert checkpoint.load(tmp_path / "c", *run[:3]) == 5
    other = {**settings, "lr": 0.1, "epochs": 4}
    with pytest.raises(PlanishError, match=r"other settings \(epochs was 2, is 4; lr was 0\.05, is 0\.1\): give the"):
        checkpoint.load(tmp_path / "c", *prepared()[:3], settings=other)


def test_an_incomplete_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "c").mkdir()
    assert not checkpoint.exists(tmp_path / "c")
    model = trained(tmp_path / "c", resume=True)
    assert tiny.same(model, trained(None))


def test_a_folder_with_other_files_is_not_taken(tmp_path):
    """Every checkpoint replaces the folder; what a user keeps in it would be gone."""
    trained(tmp_path / "c")
    trained(tmp_path / "c")
    for name in ("thesis.tex", "more.txt"):
        (tmp_path / "c" / name).write_text("mine")
    with pytest.raises(PlanishError, match=r"holds what is no checkpoint \(more.txt and 1 more\) and would be lost"):
        trained(tmp_path / "c")
    assert (tmp_path / "c" / "thesis.tex").read_text() == "mine"


class Killed(BaseException):
    pass


def killed_at(step):
    def progress(now, steps, loss):
        if now == step:
            raise Killed

    return progress


@pytest.mark.parametrize("step", [2, 5, 8])
def test_between_two_epochs_a_checkpoint_is_written_when_it_is_due(tmp_path, step):
    """After kill -9 the steps since the last one are computed again, to the identical result."""
    whole = trained(None, epochs=2)
    with pytest.raises(Killed):
        trained(tmp_path / "c", epochs=2, checkpoint_minutes=0, progress=killed_at(step))
    reached = []
    again = trained(
        tmp_path / "c", epochs=2, resume=True, seed=4, progress=lambda now, steps, loss: reached.append(now)
    )
    assert reached[0] == step  # computed, but not saved yet when it was killed
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


def test_it_is_due_after_so_many_minutes(tmp_path, monkeypatch):
    from planish.training import loop

    saved, now = [], [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", lambda *args, **_: saved.append((now[0] / 60, args[5])))

    def progress(step, steps, loss):
        now[0] += 4 * 60

    trained(tmp_path / "c", epochs=2, progress=progress)
    # every ten minutes, counted from the last one, and after each epoch of six steps
    assert saved == [(12, 3), (24, 6), (36, 9), (48, 12)]
    saved.clear()
    trained(tmp_path / "c", epochs=1, progress=progress, checkpoint_minutes=3)
    assert [step for _, step in saved] == [1, 2, 3, 4, 5, 6]


def test_a_stop_at_the_end_of_an_epoch_leaves_its_line(tmp_path):
    from planish.training import Interrupted

    steps, lines = [], []
    with pytest.raises(Interrupted):
        trained(
            tmp_path / "c", epochs=2, log=lines.append, progress=lambda *at: steps.append(at),
            should_stop=lambda: len(steps) == tiny.STEPS,
        )  # fmt: skip
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1]
    trained(tmp_path / "c", epochs=2, log=lines.append, resume=True)
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2]


def test_what_can_be_followed_is_told_every_twenty_steps(monkeypatch):
    lines = []
    trained(None, epochs=4, log=lines.append)
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [20, 24]
    settings = tiny.settings(epochs=4)
    for line in steps:
        assert line.keys() == {"event", "step", "loss", "lr", "weight_noise", "activation_noise"}
        assert 0 < line["weight_noise"] < 1
        assert line["activation_noise"] > 0
        peak = steps[0]["lr"] / settings.learning_rate(19, 24, 1.0)
        assert line["lr"] == pytest.approx(settings.learning_rate(line["step"] - 1, 24, peak))
    assert lines[-1]["event"] == "epoch"
    assert lines[-1]["loss"] == steps[-1]["loss"]
