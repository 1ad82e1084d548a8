"""Folding BatchNorm keeps the outputs, and leaves alone what it would change."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from torch import nn

from planish.errors import PlanishError
from planish.network import fold_batchnorm, unfold_batchnorm
from planish.network.folding import find_pairs
from tests.network.zoo import build, image


def randomize(model):
    """Statistics and affine parameters as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2.0)
    return model.eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def line(*layers):
    return nn.Sequential(*layers)


CASES = {
    "conv1d": (lambda: line(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), (2, 3, 9)),
    "conv2d": (lambda: line(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 3, 9, 9)),
    "grouped": (lambda: line(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "depthwise": (lambda: line(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    "conv3d": (lambda: line(nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6)), (2, 3, 4, 4, 4)),
    "transposed": (lambda: line(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed grouped": (lambda: line(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "linear": (lambda: line(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), (3, 4)),
    "affine off": (lambda: line(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 3, 9, 9)),
    "eps": (lambda: line(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.3)), (2, 3, 9, 9)),
    "activation inside": (lambda: line(nn.Conv2d(3, 6, 3), BatchNormAct2d(6)), (2, 3, 9, 9)),
    "sync": (lambda: line(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)), (2, 3, 9, 9)),
}


@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)
def test_outputs_stay(make, shape):
    torch.manual_seed(0)
    model, x = randomize(make()), torch.randn(shape)
    expected = model(x)
    assert fold_batchnorm(model, x) == [("0", "1")]
    assert relative(model(x), expected) < 1e-5
    norm = model[1]
    assert norm.running_mean.abs().max() == 0
    torch.testing.assert_close(norm.running_var + norm.eps, torch.ones_like(norm.running_var))
    assert find_pairs(model, x) == [("0", "1")]  # once more changes nothing
    fold_batchnorm(model, x)
    assert relative(model(x), expected) < 1e-5


@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)
def test_unfolded_it_computes_the_same_and_normalizes_by_its_batch_again(make, shape):
    torch.manual_seed(0)
    model, batches = randomize(make()), [torch.randn(shape) for _ in range(3)]
    expected = model(batches[0])
    assert unfold_batchnorm(model, batches) == 0  # nothing was folded
    fold_batchnorm(model, batches[0])
    if not model[1].affine:
        with pytest.raises(PlanishError, match="1: this BatchNorm without scale"):
            unfold_batchnorm(model, batches)
        return
    assert unfold_batchnorm(model, batches) == 1
    assert relative(model(batches[0]), expected) < 1e-5
    norm, inputs = model[1], torch.cat([model[0](x) for x in batches])
    dims = [d for d in range(inputs.dim()) if d != 1]
    torch.testing.assert_close(norm.running_mean, inputs.mean(dims), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, inputs.var(dims, correction=0), rtol=1e-4, atol=1e-5)
    whole = torch.cat(batches)
    if not isinstance(norm, nn.SyncBatchNorm):  # which trains on accelerators only
        assert relative(copy.deepcopy(model).train()(whole), model(whole)) < 0.05
    fold_batchnorm(model, batches[0])
    assert unfold_batchnorm(model, []) == 0  # without images it stays folded
    assert relative(model(batches[0]), expected) < 1e-5


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3"])
def test_whole_networks(name):
    torch.manual_seed(0)
    model, x = build(name)
    randomize(model)
    expected = model(x)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sorted(norm for _, norm in fold_batchnorm(model, x)) == sorted(norms)
    assert relative(model(x), expected) < 1e-5 * len(norms)


class Block(nn.Module):
    def __init__(self, use, channels=4):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def tied(block, x):
    block.conv2.weight = block.conv.weight
    return block.bn(block.conv(x)) + block.conv2(x)


def shortcut(block, x):
    y = block.conv(x)
    return block.bn(y) + y


def inplace(block, x):
    y = block.conv(x)
    y.relu_()
    return block.bn(y)


def two_norms(block, x):
    y = block.conv(x)
    return block.bn(y) * block.bn2(y)


LEFT_ALONE = {
    "shortcut": shortcut,
    "in place": inplace,
    "two norms": two_norms,
    "tied": tied,
    "returned": lambda block, x: (lambda y: (block.bn(y), y))(block.conv(x)),
    "view": lambda block, x: (lambda y: block.bn(y) + y[:, :1])(block.conv(x)),
    "layer twice": lambda block, x: block.bn(block.conv(x)) + block.conv(x * 2),
    "norm twice": lambda block, x: block.bn(block.conv(x)) + block.bn(block.conv2(x)),
    "weight read": lambda block, x: block.bn(block.conv(x)) * block.conv.weight.norm(),
    "relu between": lambda block, x: block.bn(block.conv(x).relu()),
}


@pytest.mark.parametrize("use", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_others_use_is_left_alone(use):
    torch.manual_seed(0)
    block, x = randomize(Block(use)), image(8)
    expected = block(x)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    assert find_pairs(block, x) == []  # seen in how the tensors are used, whatever their values
    assert fold_batchnorm(block, x) == []
    assert block.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    torch.testing.assert_close(block(x), expected)


def test_a_norm_whose_output_two_layers_read_is_folded():
    def use(block, x):
        y = block.bn(block.conv(x)).relu()
        return block.bn2(block.conv2(y)) + y[..., 2:, 2:].mean(1, keepdim=True)

    torch.manual_seed(0)
    block, x = Block(use, 3), image(8)
    randomize(block)
    expected = block(x)
    assert fold_batchnorm(block, x) == [("conv", "bn"), ("conv2", "bn2")]
    assert relative(block(x), expected) < 1e-5


def test_shape_and_dtype_may_be_asked_for():
    torch.manual_seed(0)

    def use(block, x):
        y = block.conv(x)
        assert y.shape[0] == 2
        assert y.dtype == torch.float32
        return block.bn(y)

    assert fold_batchnorm(randomize(Block(use)), image(8)) == [("conv", "bn")]


def test_weights_made_on_the_way_are_left_alone():
    torch.manual_seed(0)
    for first in (StdConv2d(3, 4, 3), torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))):
        model, x = randomize(line(first, nn.BatchNorm2d(4))), image(8)
        expected = model(x)
        assert fold_batchnorm(model, x) == []
        torch.testing.assert_close(model(x), expected)


def test_channels_elsewhere_are_left_alone():
    torch.manual_seed(0)
    model, x = randomize(line(nn.Linear(4, 6), nn.BatchNorm1d(6))), torch.randn(2, 6, 4)  # (batch, tokens, channels)
    expected = model(x)
    assert fold_batchnorm(model, x) == []
    torch.testing.assert_close(model(x), expected)


def test_a_norm_without_statistics_is_left_alone():
    model, x = line(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), image(8)
    assert fold_batchnorm(model, x) == []


class Sneaky(nn.Module):
    """Depends on its weight where no function call shows it."""

    def __init__(self):
        super().__init__()
        self.good, self.good_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.bn(self.conv(self.good_bn(self.good(x))))
        return x + self.conv.weight.tolist()[0][0][0][0]


def test_outputs_are_compared_and_only_what_changes_them_is_undone():
    torch.manual_seed(0)
    model, x = randomize(Sneaky()), image(8)
    expected, state = model(x), copy.deepcopy(model.conv.state_dict())
    assert find_pairs(model, x) == [("good", "good_bn"), ("conv", "bn")]
    assert fold_batchnorm(model, x) == [("good", "good_bn")]
    assert all(torch.equal(value, state[key]) for key, value in model.conv.state_dict().items())
    torch.testing.assert_close(model(x), expected)


def test_an_undone_fold_gives_back_the_missing_bias():
    torch.manual_seed(0)
    model, x = Sneaky(), image(8)
    model.conv = nn.Conv2d(3, 3, 1, bias=False)
    keys = list(model.state_dict())
    fold_batchnorm(randomize(model), x)
    assert list(model.state_dict()) == keys
    assert model.conv.bias is None


def test_modes_and_gradients_are_kept():
    model, x = randomize(line(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout())), image(8)
    model.requires_grad_(False)
    model[2].train()
    fold_batchnorm(model, x)
    assert [m.training for m in model.modules()] == [False, False, False, True]
    assert not any(p.requires_grad for p in model.parameters())
    assert (model[1].eps, model[1].momentum) == (1e-5, 0.1)


def test_folding_is_the_same_in_half_precision_and_inference_mode():
    torch.manual_seed(0)
    model, x = randomize(line(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).bfloat16(), image(8).bfloat16()
    expected = model(x)
    assert [*find_pairs(model, x)] == [("0", "1")]
    with torch.inference_mode():
        fold_batchnorm(model, x)
    assert model[0].weight.dtype == torch.bfloat16
    assert relative(model(x).float(), expected.float()) < 0.05


def test_timm_same_padding_is_folded():
    torch.manual_seed(0)
    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=3)
    randomize(model)
    x = image(32)
    expected = model(x)
    assert (
        len(fold_batchnorm(model, x))
        == len(find_pairs(model, x))
        == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    )
    assert relative(model(x), expected) < 1e-4
