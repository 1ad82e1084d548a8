import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.flattening import FlattenSettings, flatten, plain
from planish.flattening.weight_noise import KINDS
from planish.training import Interrupted, TrainingFailed
from tests.training import tiny

SILENT = {"weight_gain": 0.0, "activation_gain": 0.0, "clip_weights": False, "clip_activations": False,
          "averaging": None, "activation_noise": "gaussian"}  # fmt: skip
LOUD = FlattenSettings(training=tiny.settings(), reestimate_batches=3)


@pytest.mark.parametrize("make", [tiny.conv, tiny.vit])
@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_plain_fine_tuning_bit_for_bit(make, kind):
    batches = tiny.loader(size=16 if make is tiny.vit else 8)
    model, tuned = make(), make()
    silent = FlattenSettings(weight_noise=kind, training=tiny.settings(epochs=1), **SILENT)
    flat = flatten(model, batches, settings=silent)
    tiny.fit(tuned, [], batches, run_settings=tiny.settings(epochs=1))
    assert tiny.same(flat, tuned)
    assert tiny.same(flat, flatten(model, batches, settings=plain(tiny.settings(epochs=1))))
    assert not tiny.same(flat, model)


@pytest.mark.parametrize("make", [tiny.conv, tiny.vit])
@pytest.mark.parametrize("kind", KINDS)
def test_same_class_same_keys_and_the_given_model_is_untouched(make, kind):
    model = make()
    model.train()
    model[0].eval() if make is tiny.conv else None
    modes = [m.training for m in model.modules()]
    settings = replace(
        LOUD, weight_noise=kind, output_error=0.1, distillation=1.0, sam=0.02, clip_weights=kind != "iid"
    )
    flat = flatten(model, tiny.loader(size=16 if make is tiny.vit else 8), "w3a3", settings=settings, epochs=1, seed=3)
    assert tiny.same(model, make())
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    assert type(flat) is type(model)
    assert [type(m) for m in flat.modules()] == [type(m) for m in model.modules()]
    assert list(flat.state_dict()) == list(model.state_dict())
    assert not any(m.training for m in flat.modules())
    assert not tiny.same(flat, model)
    assert all(torch.isfinite(p).all() for p in flat.parameters())
    image = torch.randn(1, 1, 16, 16) if make is tiny.vit else torch.randn(1, 1, 8, 8)
    assert torch.equal(flat(image), flat(image))  # nothing random is left
    copy.deepcopy(flat)


def test_seed_decides_everything():
    def run(seed):
        torch.manual_seed(torch.seed() % 1000)
        return flatten(tiny.conv(), tiny.loader(), settings=LOUD, seed=seed, epochs=1)

    assert tiny.same(run(1), run(1))
    assert not tiny.same(run(1), run(2))


def test_no_epochs_give_the_same_network():
    assert tiny.same(flatten(tiny.conv(), tiny.loader(), settings=LOUD, epochs=0), tiny.conv())


def test_statistics_are_reestimated_on_clean_weights():
    flat = flatten(tiny.conv(), tiny.loader(), settings=replace(LOUD, reestimate_batches=6), epochs=1)
    twin = copy.deepcopy(flat)
    outputs = torch.cat([twin[0](images).transpose(0, 1).flatten(1).T for images, _ in tiny.loader()])
    torch.testing.assert_close(flat[1].running_mean, outputs.mean(0), atol=1e-5, rtol=1e-4)


def test_resumed_flattening_is_bit_identical(tmp_path):
    settings = replace(LOUD, weight_noise="residual", activation_noise="residual")
    whole = flatten(tiny.conv(), tiny.loader(), settings=settings)
    calls = iter([False] * 8 + [True])
    with pytest.raises(Interrupted):
        flatten(
            tiny.conv(),
            tiny.loader(),
            settings=settings,
            checkpoint_dir=tmp_path / "c",
            should_stop=lambda: next(calls),
        )
    again = flatten(tiny.conv(), tiny.loader(), settings=settings, checkpoint_dir=tmp_path / "c", resume=True)
    assert tiny.same(whole, again)


@pytest.mark.parametrize(
    ("changes", "perturbs"),
    [
        ({}, False),
        ({"weight_noise": "iid"}, True),
        ({"weight_noise": "iid", "weight_gain": 0.0}, False),
        ({"clip_weights": True}, True),
        ({"clip_activations": True}, True),
        ({"activation_noise": "uniform"}, True),
        ({"sam": 0.1}, True),
        ({"averaging": 0.9}, False),
    ],
)
def test_perturbs_says_whether_a_step_is_computed_elsewhere(changes, perturbs):
    settings = plain(tiny.settings(epochs=1, lr=0.5), **changes)
    assert settings.perturbs is perturbs
    moved = not tiny.same(
        flatten(tiny.conv(), tiny.loader(), "w2a2", settings=replace(settings, averaging=None, reestimate_batches=0)),
        flatten(tiny.conv(), tiny.loader(), "w2a2", settings=plain(tiny.settings(epochs=1, lr=0.5))),
    )
    assert moved is perturbs


def test_without_labels():
    batches = [(images, torch.full((4,), -1)) for images, _ in tiny.loader()]
    settings = replace(LOUD, task=0.0, distillation=1.0, output_error=0.5)
    assert not tiny.same(flatten(tiny.conv(), batches, settings=settings, epochs=1), tiny.conv())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flatten(tiny.conv(), [], settings=LOUD), "yields no batch"),
        (lambda: flatten(tiny.conv(), tiny.loader(), settings=replace(LOUD, task=0.0)), "nothing to minimise"),
        (lambda: flatten(tiny.conv(), tiny.loader(), "w9a4", settings=LOUD), "w9a4"),
        (lambda: flatten(tiny.conv(), tiny.loader(), allow=("nowhere",), settings=LOUD), "nowhere"),
        (
            lambda: flatten(nn.Sequential(nn.Flatten(0, 1), nn.LSTM(8, 4)), tiny.loader(), settings=LOUD),
            "no tap can reach",
        ),
    ],
)
def test_mistakes_get_a_sentence(call, message):
    with pytest.raises(PlanishError, match=message):
        call()


def test_a_diverging_run_says_so():
    with pytest.raises(TrainingFailed, match="lower the learning rate"):
        flatten(tiny.mlp(), tiny.loader(), settings=plain(tiny.settings(lr=1e30, clip_norm=None, epochs=3)))


def test_a_pattern_that_matches_nothing_is_refused_without_noise_too():
    with pytest.raises(PlanishError, match="allow='nowhere' matches no matrix product"):
        flatten(tiny.conv(), tiny.loader(), settings=plain(tiny.settings(epochs=1)), allow="nowhere")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.rnn(x[:, 0])[0][:, -1])


def test_a_pattern_without_noise_need_not_name_every_product_out_of_reach():
    model, settings = Recurrent(), plain(tiny.settings(epochs=1))
    assert not tiny.same(flatten(model, tiny.loader(), settings=settings, allow="head"), model)
    with pytest.raises(PlanishError, match="allow='hat' matches no matrix product"):
        flatten(model, tiny.loader(), settings=settings, allow="hat")


def test_sam_alone_needs_no_product_in_reach():
    settings = plain(tiny.settings(epochs=1), sam=0.05)
    assert torch.isfinite(flatten(Recurrent(), tiny.loader(), settings=settings)(torch.randn(2, 1, 8, 8))).all()
    with pytest.raises(PlanishError, match="no tap can reach it"):
        flatten(Recurrent(), tiny.loader(), settings=LOUD)


def test_noise_of_the_update_has_nothing_to_clip():
    with pytest.raises(PlanishError, match="nothing to clip"):
        flatten(tiny.conv(), tiny.loader(), settings=replace(LOUD, weight_noise="iid", clip_weights=True))
