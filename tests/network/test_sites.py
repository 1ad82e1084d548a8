"""Watching one forward pass finds every matrix product, at its true cost."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from planish.errors import PlanishError
from planish.network import watch
from planish.network.batches import call_model
from tests.network.zoo import NAMES, build, image


@pytest.mark.parametrize("name", NAMES)
def test_macs_equal_those_of_pytorchs_own_counter(name):
    model, example = build(name)
    watched = watch(model, example)
    with FlopCounterMode(display=False) as counter:  # with gradients: PyTorch does not count its inference kernels
        call_model(model, example)
    assert not watched.unreachable
    assert 2 * 2 * sum(product.macs for product in watched.products) == counter.get_total_flops()
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_model_comes_back_as_it_was(name):
    model, example = build(name)
    model.train()
    next(model.children()).eval()
    before = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    watch(model, example)
    assert [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()] == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_kinds_of_convolution_and_their_sites():
    watched = watch(*build("convolutions"))
    assert [(p.name, p.weight.channel_axis) for p in watched.products] == [
        ("stem.conv2d", 0), ("grouped.conv2d", 0), ("depthwise.conv2d", 0), ("up.conv_transpose2d", 1),
        ("line.conv1d", 0), ("up_line.conv_transpose1d", 1), ("head.linear", 0),
    ]  # fmt: skip
    assert [site.name for site in watched.products[0].sites] == ["stem.input", "stem.weight"]
    assert all(p.weight.parameter for p in watched.products)


@pytest.mark.parametrize(
    "name", ["torchvision_vit", "hf_vit_sdpa", "hf_vit_eager", "test_vit", "vit_gray_28", "encoder"]
)
def test_attention_gives_four_operands(name):
    watched = watch(*build(name))
    operands = [site for product in watched.products for site in product.sites if site.role == "operand"]
    layers = sum(p.operator in ("attention_qk", "matmul") for p in watched.products) // (2 if "eager" in name else 1)
    assert len(operands) == 4 * layers
    assert layers >= 2


def test_einsum_and_bmm_operands():
    watched = watch(*build("einsum"))
    names = [product.name for product in watched.products]
    assert names == ["einsum", "einsum1", "matmul", "bmm", "baddbmm", "head.linear"]
    projection = watched.products[0]
    assert [(s.name, s.role) for s in projection.sites] == [("einsum_operand0", "input"), ("w", "weight")]
    assert [s.role for s in watched.products[1].sites] == ["operand", "operand"]


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bnc,oc->bno", [(2, 3, 1), (4, 1)], 12),
        ("bi,io->bo", [(2, 1), (1, 5)], 5),
        ("bic,boc->bio", [(2, 3, 1), (2, 4, 1)], 12),
        ("bi,io,oj->bj", [(2, 1), (1, 5), (5, 2)], 15),  # in two halves, from left to right: 5 and 10
    ],
)
def test_an_einsum_over_a_dimension_of_size_one_is_a_product(equation, shapes, macs, monkeypatch):
    monkeypatch.setattr(
        torch.backends.opt_einsum, "enabled", False
    )  # which chooses another order, where it is installed

    class Contract(nn.Module):
        def forward(self, *operands):
            return torch.einsum(equation, *operands)

    watched = watch(Contract(), tuple(torch.randn(shape) for shape in shapes))
    assert [(p.name, p.macs, len(p.sites)) for p in watched.products] == [("einsum", macs, len(shapes))]
    assert not watched.unreachable


def test_weights_by_position():
    conv1d = watch(*build("gpt2")).products[0]
    assert (conv1d.operator, conv1d.weight.name, conv1d.weight.channel_axis) == ("addmm", "up.weight", -1)
    standardized = watch(*build("test_nfnet")).products[0]
    assert standardized.weight.name == "stem.conv1.conv2d_weight"
    assert not standardized.weight.parameter
    for name in ("beit", "eva"):  # F.linear with a child's weight
        qkv = next(p for p in watch(*build(name)).products if p.module == "blocks.0.attn")
        assert qkv.weight.parameter
        assert qkv.weight.name.startswith("blocks.0.attn.")
    twice = watch(*build("twice"))
    assert [p.name for p in twice.products] == ["body.linear", "tied.linear", "head.linear"]
    assert twice.products[1].weight == twice.products[0].weight
    assert twice.products[0].weight.name == "body.weight"


class Views(nn.Module):
    """Parameters that enter products as views, on either side, and a query that is a parameter."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.vector = (nn.Parameter(torch.randn(s)) for s in ((6, 8), (6, 8), (6,)))
        self.query = nn.Parameter(torch.randn(1, 6))
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        x = (self.left @ x.T).T
        return (
            self.lin(self.query)
            + x @ self.right.T[:6, :6]
            + torch.einsum("bi,oi->bo", x, self.right[:, :6])
            @ (self.vector[:, None] * torch.einsum("i,j->ij", self.vector, self.vector))
        )


def test_views_of_parameters_are_weights_and_inputs_never_are():
    watched = watch(Views(), torch.randn(6, 8))
    sites = {site.name: (site.role, site.channel_axis, site.parameter) for site in watched.sites}
    assert sites["left"] == ("weight", -2, True)
    assert sites["matmul1_other"] == ("weight", -1, False)
    assert sites["einsum_operand1"] == ("weight", -2, False)
    assert sites["lin.input"] == ("input", None, False)
    assert [p.key for p in watched.products if p.operator == "einsum"] == ["einsum"]  # an outer product sums nothing


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner.forward(x)


def test_a_forward_called_by_name_belongs_to_its_module():
    assert [p.name for p in watch(Direct(), torch.randn(2, 4)).products] == ["inner.linear"]


def test_parametrized_weights_are_watched_as_derived():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    (product,) = watch(model, torch.randn(2, 4)).products
    assert (product.weight.name, product.weight.parameter) == ("0.linear_weight", False)


def test_macs_of_what_does_not_grow_with_the_batch_do_not_vanish():
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 2))

        def forward(self, x):
            return x + (self.w @ self.w).sum()

    assert [p.macs for p in watch(Prior(), torch.randn(16, 2)).products] == [1]


def test_watching_works_in_inference_mode():
    model, example = build("test_resnet")
    expected = [(p.name, p.macs) for p in watch(model, example).products]
    with torch.inference_mode():
        assert [(p.name, p.macs) for p in watch(model, example).products] == expected


def test_an_example_that_does_not_fit_is_named():
    for name in ("vit_gray_28", "test_resnet"):
        with pytest.raises(PlanishError, match=r"does not run on an example of shape \(2, 5, 8, 8\)"):
            watch(build(name)[0], image(8, 5))


def test_forwards_are_restored_after_an_error():
    model, _ = build("test_resnet")
    with pytest.raises(PlanishError):
        watch(model, image(8, 5))
    assert all("forward" not in module.__dict__ for module in model.modules())


class Centred(nn.Module):
    """Centres its images, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place, self.head = in_place, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.sub_(1.0) if self.in_place else x - 1.0)


def test_a_model_that_changes_its_images_is_refused_and_they_are_not_changed():
    images = torch.ones(4, 3)
    assert len(watch(Centred(in_place=False), images).products) == 1
    for context in (torch.inference_mode(), torch.no_grad()):
        with context, pytest.raises(PlanishError, match="Centred changes its images in place"):
            watch(Centred(in_place=True), images)
    assert torch.equal(images, torch.ones(4, 3))
