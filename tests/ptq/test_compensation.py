"""Block compensation: which blocks, the closed form, the plan, and files."""

import copy

import pytest
import timm
import torch
from torch import nn

import planish
from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.network import taps_of, watch, weights_megabytes
from planish.network.batches import first_image
from planish.network.rebuilding import rebuilt, turned_channels
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.compensation import CHILD, BlockCompensation, add_compensation, find_blocks
from planish.ptq.gptq import GPTQ
from planish.ptq.outputs import KeepFloat
from planish.ptq.rotate import Rotate
from tests.deploy.tiny import LOOKS, RECIPES
from tests.network.zoo import build
from tests.ptq.test_gptq import Keep, wide
from tests.ptq.test_quantize import run, same_state
from tests.ptq.test_ridge import LAM, least_squares

PREPARE = [FoldBatchNorm(), Calibrate(), Round()]

BLOCKS = {
    "vit_gray_28": [("blocks.0", 32, False), ("blocks.1", 32, False)],
    "convnext": [(f"stages.{i}.blocks.0", c, True) for i, c in enumerate((8, 16, 24, 32))],
    "swin": [(f"layers.{i}.blocks.{j}", c, False) for i, c in enumerate((16, 32)) for j in (0, 1)],
    "test_resnet": [("layer1.0", 32, True)],
    "encoder": [("encoder.layers.1", 16, False)],  # the other one holds the first product of the network
    "hf_vit_sdpa": [("vit.layers.0", 32, False), ("vit.layers.1", 32, False)],
    "twice": [],
    "convolutions": [],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_of_many_networks(name):
    model, example = build(name)
    example = first_image(example)
    assert find_blocks(model, example, watch(model, example).products) == BLOCKS[name]


class Block(nn.Module):
    def __init__(self, width=6, kind="plain"):
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(width, 9), nn.Linear(9, width), kind

    def forward(self, x, scale=1.0):
        change = scale * self.down(self.up(x).relu())
        return x.add_(change) if self.kind == "in place" else x + change


def stack(kind="plain"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Sequential(Block(kind=kind), nn.ReLU(), Block(kind=kind)), nn.Linear(6, 3))


def test_a_block_that_changes_its_input_in_place_or_runs_twice_is_left_alone():
    x = torch.randn(2, 4, 5)
    model = stack("in place")
    assert find_blocks(model, x, watch(model, x).products) == []
    model = stack()
    model[1].append(model[1][0])
    assert find_blocks(model, x, watch(model, x).products) == [("1.2", 6, False)]


@torch.no_grad()
def test_the_pass_on_a_stack_is_what_a_loop_over_its_blocks_gives():
    model, x = stack(), torch.randn(40, 4, 5, generator=torch.Generator().manual_seed(1))
    rounded = quantize(model, [x], "w2a2", PREPARE)
    ours = quantize(model, x.split(11), "w2a2", [*PREPARE, BlockCompensation(LAM)])
    quantized, exact = rounded[0](x), model[0](x)
    for i, module in enumerate(m for m in rounded[1] if isinstance(m, (Block, nn.ReLU))):
        if isinstance(module, nn.ReLU):
            quantized, exact = quantized.relu(), exact.relu()
            continue
        inputs, quantized, exact = quantized, module(quantized), model[1][i](exact)
        missing = (exact - quantized).flatten(0, 1)
        solution = least_squares(inputs.flatten(0, 1).T, missing.T, LAM, True).float()
        added = ours[1].get_submodule(f"{i}.{CHILD}")
        torch.testing.assert_close(added.weight, solution[:, :-1], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(added.bias, solution[:, -1], atol=1e-4, rtol=1e-3)
        better = quantized + inputs @ solution[:, :-1].T + solution[:, -1]
        assert (exact - better).norm() < (exact - quantized).norm()
        quantized = better
    torch.testing.assert_close(run(ours, x), rounded[2](quantized), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["vit_gray_28", "test_resnet", "swin"])
def test_a_new_map_is_zero_and_changes_nothing(name):
    model, example = build(name)
    expected, blocks = run(model, example), BLOCKS[name]
    assert add_compensation(model, blocks=blocks) == [path for path, *_ in blocks]
    assert torch.equal(run(model, example), expected)
    assert torch.equal(run(copy.deepcopy(model), example), expected)
    example = first_image(example)
    assert find_blocks(model, example, watch(model, example).products) == []


def test_less_error_at_the_logits_of_a_rounded_network():
    model, images = wide()
    expected = run(model, images)
    plain, ours = (quantize(model, images.split(32), "w3a3", passes) for passes in (PREPARE, [*PREPARE, added()]))
    assert (run(ours, images) - expected).norm() < 0.85 * (run(plain, images) - expected).norm()


def added():
    return BlockCompensation()


def test_the_plan_lists_the_maps_in_float_and_everything_else_as_it_was():
    model, images = wide()
    before = copy.deepcopy(model)
    records = []
    plain = quantize(model, [images], "w3a3", PREPARE, allow=["blocks.0.attn*"])
    ours = quantize(model, [images], "w3a3", [*PREPARE, added(), Keep(records)], allow=["blocks.0.attn*"])
    assert same_state(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, ours) for m in net.modules())
    theirs, own = (planish.ledger(m).as_dicts() for m in (plain, ours))
    new = [row for row in own if CHILD in row["site"]]
    assert [row["site"] for row in new] == [f"blocks.{i}.{CHILD}.{s}" for i in (0, 1) for s in ("input", "weight")]
    assert all(row["bits"] is None and row["share"] > 0 for row in new)
    rest = [{k: v for k, v in row.items() if k != "share"} for row in own if row not in new]
    assert rest == [{k: v for k, v in row.items() if k != "share"} for row in theirs]
    assert planish.ledger(ours).shares["float"] > planish.ledger(plain).shares["float"]
    there = dict(taps_of(plain))
    assert dict(taps_of(ours)).keys() == there.keys()
    assert all(torch.equal(tap.scale, there[name].scale) for name, tap in taps_of(ours))
    assert weights_megabytes(ours) > weights_megabytes(plain)
    assert [record["text"] for record in records if record["event"] == "note"] == ["2 blocks got a linear map in float"]


def test_without_blocks_nothing_changes():
    model, example = build("twice")
    records = []
    ours = quantize(model, [example], "w4a4", [*PREPARE, added(), Keep(records)])
    plain = quantize(model, [example], "w4a4", PREPARE)
    assert same_state(ours, plain)
    assert torch.equal(run(ours, example), run(plain, example))
    assert rebuilt(ours) == []
    assert [record["text"] for record in records if record["event"] == "note"] == ["no residual block was found"]


def test_done_twice_it_is_done_once():
    model, images = wide()
    once, twice = (quantize(model, [images], "w3a3", [*PREPARE, *[added()] * n]) for n in (1, 2))
    assert same_state(once, twice)


@pytest.mark.parametrize("before", [(), (Rotate(),)])
@pytest.mark.parametrize("rounding", [Round(), GPTQ()])
def test_a_rotated_stream_has_rotated_targets(before, rounding):
    model, images = wide()
    expected = run(model, images)
    passes = [*before, FoldBatchNorm(), Calibrate(), rounding]
    plain, ours = (quantize(model, images.split(32), "w3a3", [*passes, *more]) for more in ([], [added()]))
    assert (run(ours, images) - expected).norm() < 0.95 * (run(plain, images) - expected).norm()


def test_at_8_bits_the_maps_of_a_rotated_network_are_next_to_nothing():
    model, images = wide()
    ours = quantize(model, [images], "w8a8", [Rotate(), *PREPARE, added()])
    assert all(ours.blocks[i].get_submodule(CHILD).weight.norm() < 0.1 for i in (0, 1))


class Turn:
    """A pass of one's own that notes a change of the float network in the model alone."""

    name = "turn"

    def __call__(self, calibration):
        turned_channels(calibration.model, ["head"])


def test_a_float_network_that_was_kept_before_a_change_of_structure():
    model, images = wide()
    early, late = (
        quantize(model, [images], "w3a3", passes)
        for passes in ([KeepFloat(), Rotate(), *PREPARE, added()], [Rotate(), *PREPARE, added()])
    )
    assert torch.equal(run(early, images), run(late, images))  # what was kept is let go
    with pytest.raises(PlanishError, match=r"has another structure now .* put KeepFloat\(\) behind"):
        quantize(model, [images], "w3a3", [KeepFloat(), Turn(), Calibrate(), Round(), added()])


@pytest.mark.parametrize("name", list(RECIPES))
def test_saved_and_loaded(name, tmp_path):
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = timm.create_model(recipe["architecture"], **recipe["arguments"]).eval()
    images = torch.randn(4, 1, 32, 32)
    ours = quantize(model, [images], "w2a4", [*PREPARE, added()])
    save(ours, tmp_path / "q.safetensors", recipe=recipe, preprocessing=LOOKS, protocol={})
    loaded = load(tmp_path / "q.safetensors")
    assert torch.equal(run(loaded, images), run(ours, images))
    assert planish.ledger(loaded).shares == planish.ledger(ours).shares
    assert any(CHILD in name for name, _ in loaded.named_modules())


def test_refusals():
    with pytest.raises(PlanishError, match=r"block-compensation: lam is 0\.0: give a share"):
        BlockCompensation(0.0)
    model, images = wide()

    class Forget:
        name = "forget"

        def __call__(self, calibration):
            calibration.given = None

    with pytest.raises(PlanishError, match="the calibration has no float network"):
        quantize(model, [images], "w3a3", [*PREPARE, Forget(), added()])
