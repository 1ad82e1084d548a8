"""One set of trials that every training method goes through."""

import pytest
import timm
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.models import Preprocessing
from planish.network import ledger, weights_megabytes
from planish.qat import METHODS, QATSettings, train_quantized
from planish.quantizers import TrainableQuantizer
from planish.training import Ingredient, Interrupted
from tests.training import tiny

VIT = {
    "source": "timm", "architecture": "vit_tiny_patch16_224",
    "arguments": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1,
                  "num_classes": 4},
}  # fmt: skip
RESNET = {
    "source": "timm", "architecture": "test_resnet",
    "arguments": {"num_classes": 4, "in_chans": 1, "drop_path_rate": 0.2, "drop_rate": 0.1},
}  # fmt: skip
LOOKS = Preprocessing((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
SETTINGS = QATSettings(averaging=0.9, training=tiny.settings(epochs=1, lr=0.01))


def build(recipe):
    torch.manual_seed(0)
    return timm.create_model(recipe["architecture"], **recipe["arguments"])


def batches():
    return tiny.loader(n=12, size=16)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scheme", ["w4a4", "w2a2"])
def test_saved_and_loaded_it_computes_the_same(name, scheme, tmp_path):
    for recipe in (VIT, RESNET):
        trained = train_quantized(build(recipe), batches(), scheme, name, settings=SETTINGS)
        path = tmp_path / f"{recipe['architecture']}.safetensors"
        save(trained, path, recipe=recipe, preprocessing=LOOKS, protocol={"method": name})
        loaded = load(path)
        x = torch.randn(3, 1, 16, 16)
        assert torch.isfinite(trained(x)).all()
        assert torch.equal(loaded(x), trained(x))
        assert loaded.planish_protocol == {"method": name}
        assert str(ledger(loaded)) == str(ledger(trained))
        whole = sum(p.numel() for p in trained.parameters()) * 4e-6
        assert weights_megabytes(loaded) == weights_megabytes(trained) < 0.6 * whole


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_decides_everything(name):
    def run(seed):
        torch.manual_seed(torch.seed() % 1000)
        return train_quantized(tiny.conv(dropout=0.2), tiny.loader(), "w4a4", name, settings=SETTINGS, seed=seed)

    assert tiny.same(run(1), run(1))
    assert not tiny.same(run(1), run(2))


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_work_in_place_give_the_same(name):
    def run(inplace):
        return train_quantized(tiny.InPlace(inplace), tiny.loader(), "w3a3", name, settings=SETTINGS, seed=0)

    assert tiny.same(run(False), run(True))


@pytest.mark.parametrize("name", METHODS)
def test_interrupted_and_resumed_it_is_the_same(name, tmp_path):
    settings = QATSettings(averaging=0.9, training=tiny.settings(epochs=2, optimizer="adamw", lr=0.003))

    def run(**options):
        return train_quantized(tiny.vit(), tiny.loader(size=16), "w2a4", name, settings=settings, **options)

    steps = []
    with pytest.raises(Interrupted):
        run(checkpoint_dir=tmp_path / "c", should_stop=lambda: steps.append(1) or len(steps) == 9)
    assert tiny.same(run(), run(checkpoint_dir=tmp_path / "c", resume=True))


class Modes(Ingredient):
    """What the network's own settings are while it is trained."""

    def after_step(self, run):
        self.seen = settings_of(run.model)
        taps = [tap for tap in run.model.modules() if isinstance(tap, TrainableQuantizer)]
        self.scales = [float(tap.grid.scale.min()) for tap in taps]
        # a grid does not show whether the parameter behind it has left its domain
        self.learned = [
            float(p.detach().min()) for t in taps for n, p in t.named_parameters() if n in ("scale", "alpha")
        ]
        self.dtypes = {p.dtype for n, p in run.model.named_parameters() if "planish_taps" in n}


def settings_of(model):
    """Every eps, momentum and rate of a model's own modules; other tools lose them when modes are switched."""
    names = ("eps", "momentum", "p", "drop_prob", "drop_rate", "affine", "track_running_stats")
    found = {}
    for path, module in model.named_modules():
        if "planish_taps" not in path:
            found |= {f"{path}.{n}": getattr(module, n) for n in names if hasattr(module, n)}
    return found


def odd():
    """A network whose settings are all different from the defaults."""
    model = build(RESNET)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps, norm.momentum = 1e-3 * (i + 1), 0.01 * (i + 1)
    model.act1 = nn.Sequential(model.act1, nn.Dropout(0.15))  # timm's own is a function, its rate an attribute
    return model


@pytest.mark.parametrize("name", METHODS)
def test_batchnorm_dropout_and_stochastic_depth_keep_their_values(name):
    model, modes = odd(), Modes()
    before = settings_of(model)
    assert {"act1.1.p", ".drop_rate"} < set(before)
    assert any(key.endswith("drop_prob") for key in before)
    trained = train_quantized(model, batches(), "w4a4", name, settings=SETTINGS, extra=[modes])
    for seen in (modes.seen, settings_of(trained), settings_of(model)):
        assert {key: value for key, value in seen.items() if key in before} == before


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scheme", ["w4a4", "w2a2"])
def test_scales_stay_positive_under_an_absurd_learning_rate(name, scheme):
    modes = Modes()
    settings = QATSettings(averaging=None, training=tiny.settings(epochs=1, lr=30.0, clip_norm=0.1))
    train_quantized(tiny.conv(), tiny.loader(), scheme, name, settings=settings, extra=[modes])
    assert min(modes.scales) > 0
    assert min(modes.learned) > 0


@pytest.mark.parametrize("name", METHODS)
def test_constant_layers_make_no_nan(name):
    model = tiny.conv()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        model[4].weight.fill_(0.3)
    trained = train_quantized(model, tiny.loader(), "w2a2", name, settings=SETTINGS)
    assert torch.isfinite(trained(torch.randn(3, 1, 8, 8))).all()
    assert all(torch.isfinite(t).all() for t in trained.state_dict().values())


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_training_keeps_scales_in_float32(name):
    modes = Modes()
    settings = QATSettings(averaging=None, training=tiny.settings(epochs=1, lr=0.01, mixed_precision="bf16"))
    trained = train_quantized(tiny.vit(), batches(), "w4a4", name, settings=settings, extra=[modes])
    assert modes.dtypes <= {torch.float32}
    assert torch.isfinite(trained(torch.randn(3, 1, 16, 16))).all()
