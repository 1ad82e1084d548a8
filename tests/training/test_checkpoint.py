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


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, error):
    first = trained(tmp_path / "c")

    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(PlanishError, match=r"No space left.*previous one is kept"):
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
