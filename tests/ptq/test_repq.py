"""RepQ's fold: codes of the channels' grids from one grid, the same outputs in float."""

import copy

import pytest
import timm
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.network import assign, taps_of, watch
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.passes import Calibration, run_logits
from planish.ptq.repq import LEAST, Ranges, RepQ, channel_ranges, fold_into, one_range
from planish.scheme import Format, Scheme
from tests.network.zoo import build

ARGUMENTS = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "in_chans": 1,
    "num_classes": 4,
}
X = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
AFFINE, SYMMETRIC = (Format(4, symmetric=symmetric) for symmetric in (False, True))


def vit(**options):
    """A ViT whose LayerNorms put out channels of very different sizes and centres."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, **options}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.mul_(torch.randn(24).exp())
            norm.bias.add_(torch.randn(24))
    return model


def work_on(model, x=X, scheme="w4a4"):
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    return Calibration(twin, [x], assign(watch(twin, x[:1]), scheme), run_logits(twin, [x]))


def notes(work):
    assert all(line["event"] == "note" and line["pass"] == "repq" for line in work.log)
    return [line["text"] for line in work.log]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def channels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(9, generator=generator, dtype=torch.float64) + 0.2
    zero = torch.randint(3, 12, (9,), generator=generator).double()
    return Ranges(scale, zero), torch.randn(500, 9, generator=generator, dtype=torch.float64) * 2


def test_one_grid_gives_the_codes_of_the_channels_grids():
    """With integer zero points: round(x' / s~) + z~ == round(x / s) + z, equations 8 to 12."""
    ranges, x = channels()
    factor, shift = one_range(ranges, AFFINE)
    common_scale, common_zero = ranges.scale.mean(), ranges.zero.mean().round()
    torch.testing.assert_close(factor, ranges.scale / common_scale)
    torch.testing.assert_close(shift, ranges.scale * (ranges.zero - common_zero))
    codes = torch.round((x + shift) / factor / common_scale) + common_zero
    assert torch.equal(codes, torch.round(x / ranges.scale) + ranges.zero)


def test_a_symmetric_grid_gets_channels_around_zero():
    ranges, _ = channels()
    factor, shift = one_range(ranges, SYMMETRIC)
    centres = -ranges.zero * ranges.scale
    torch.testing.assert_close((centres + shift) / factor, torch.zeros(9, dtype=torch.float64))


def test_a_constant_channel_is_not_blown_up():
    ranges = Ranges(torch.tensor([1.0, 1.0, 2.0**-120]).double(), torch.tensor([7.0, 8.0, -3.0 * 2**120]).double())
    factor, shift = one_range(ranges, AFFINE)
    assert factor.min() > 0.9 * LEAST
    torch.testing.assert_close(shift[2], torch.tensor(-3.0).double(), atol=0.2, rtol=0)  # it is 3 everywhere
    assert ((3 + shift[2]) / factor[2]).abs() < 20


def test_the_fold_is_exact():
    torch.manual_seed(0)
    norm, layers = nn.LayerNorm(9).double(), [nn.Linear(9, 4).double(), nn.Linear(9, 3, bias=False).double()]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(20, 9).double()
    ranges, _ = channels()
    fold = one_range(ranges, AFFINE)
    before, expected = norm(x), [layer(norm(x)) for layer in layers]
    fold_into(norm, layers, fold)
    torch.testing.assert_close(norm(x), (before + fold.shift) / fold.factor)
    for layer, y in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(norm(x)), y)


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_ranges_are_those_of_each_channel_and_need_not_contain_zero(observer):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.rand(40, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 8.0]) + 10
    nn.init.eye_(model[0].weight.data)
    activations = Format(4, symmetric=False, observer=observer)
    work = work_on(model.requires_grad_(False), x, Scheme("w4a4", Format(4, "channel"), activations, edge_bits=None))
    (site,) = [s for p in work.assignment.products for s in p.sites if s.name == "1.input"]
    ranges = channel_ranges(work, [site])["1.input"]
    low, high = x.flatten(0, 1).amin(0), x.flatten(0, 1).amax(0)
    bottom, top = ((q - ranges.zero) * ranges.scale for q in (0, 15))
    assert ((bottom - low).abs() < 0.6 * ranges.scale + 0.02 * (high - low)).all()  # the zero point is rounded
    assert ((top - high).abs() < 0.6 * ranges.scale + 0.02 * (high - low)).all()
    if observer == "minmax":
        torch.testing.assert_close(ranges.scale, (high - low).double() / 15, rtol=1e-4, atol=1e-6)
    assert next(taps_of(work.model), None) is None


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"reg_tokens": 1, "init_values": 0.1}])
@pytest.mark.parametrize("scheme", ["w4a4", "w2a2"])
def test_outputs_stay_the_same_and_channels_become_alike(options, scheme):
    model = vit(**options)
    work = work_on(model, scheme=scheme)
    RepQ()(work)
    assert notes(work) == []
    (now,) = run_logits(work.model, [X])
    assert (now - work.reference[0]).abs().max() < 1e-4 * work.reference[0].abs().max()

    def spread(m):
        inputs = []
        m.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
        run_logits(m, [X])
        stds = inputs[0].flatten(0, 1).std(0)
        return (stds.max() / stds.min()).item()

    assert spread(copy.deepcopy(work.model)) < 3 < 10 < spread(copy.deepcopy(model))


def test_one_range_costs_less_afterwards():
    model = vit()

    def error(passes):
        ours = quantize(model, [X], "w8a4", [*passes, Calibrate(), Round()])
        (now,), (then,) = run_logits(ours, [X]), run_logits(model, [X])
        return (now - then).square().mean()

    assert error([RepQ()]) < 0.5 * error([])


@pytest.mark.parametrize(("name", "layer"), [
    ("swin", "layers.1.downsample.reduction"),
    ("torchvision_swin", "features.1.1.attn.qkv"),
    ("hf_vit_sdpa", "vit.layers.0.attention.k_proj"),
    ("test_convnext", "stages.1.blocks.0.mlp.fc1"),
    ("torchvision_vit", "encoder.layers.encoder_layer_0.mlp.0"),
    ("beit", "blocks.0.mlp.fc1"),
])  # fmt: skip
def test_norms_of_many_models(name, layer):
    model, x = build(name)
    if isinstance(x, dict):
        twin = copy.deepcopy(model).requires_grad_(False)
        work = Calibration(
            twin, [x], assign(watch(twin, {k: v[:1] for k, v in x.items()}), "w4a4"), run_logits(twin, [x])
        )
    else:
        work = work_on(model, x)
    RepQ()(work)
    assert notes(work) == []
    torch.testing.assert_close(run_logits(work.model, [x])[0], work.reference[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(work.model.get_submodule(layer).weight, model.get_submodule(layer).weight)


class Padded(nn.Module):
    """Two norms, one of which cannot be folded: the tokens are exchanged for channels on the way."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LayerNorm(6), nn.LayerNorm(6)
        self.first, self.a, self.b, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = self.a(self.one(self.first(x)).transpose(1, 2))
        return self.last(self.b(self.two(x)))


def test_a_norm_that_cannot_be_folded_is_left_out_by_name():
    torch.manual_seed(0)
    model, x = Padded().requires_grad_(False), torch.randn(8, 6, 6) * torch.tensor([0.1, 1, 5, 1, 2, 1])
    work = work_on(model, x)
    RepQ()(work)
    assert len(notes(work)) == 1
    assert "folding the ranges into one changes the outputs" in notes(work)[0]
    assert torch.equal(work.model.a.weight, model.a.weight)
    assert not torch.equal(work.model.b.weight, model.b.weight)
    torch.testing.assert_close(run_logits(work.model, [x])[0], work.reference[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "scheme"), [("test_resnet", "w4a4"), ("vit_gray_28", "w4")])
def test_where_there_is_nothing_to_do_it_says_so(name, scheme):
    model, x = build(name)
    work = work_on(model, x, scheme)
    RepQ()(work)
    assert notes(work) == ["no LayerNorm is read by linear layers with quantized inputs only"]
    assert same_state(work.model, model)


def test_twice_the_same():
    first, second = (work_on(vit()) for _ in range(2))
    RepQ()(first)
    RepQ()(second)
    assert same_state(first.model, second.model)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}])
def test_save_and_load(options, tmp_path):
    quantized = quantize(vit(**options), [X], "w4a4", [RepQ(), FoldBatchNorm(), Calibrate(), Round()])
    recipe = {"source": "timm", "architecture": "vit_tiny_patch16_224", "arguments": {**ARGUMENTS, **options}}
    looks = Preprocessing((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
    save(quantized, tmp_path / "q.safetensors", recipe=recipe, preprocessing=looks, protocol={"method": "repq"})
    loaded = load(tmp_path / "q.safetensors")
    assert torch.equal(run_logits(loaded, [X])[0], run_logits(quantized, [X])[0])


def test_a_late_place_in_the_list_is_refused():
    with pytest.raises(PlanishError, match="repq changes the network in float: put it before"):
        quantize(vit(), [X], "w4a4", [Calibrate(), RepQ(), Round()])
