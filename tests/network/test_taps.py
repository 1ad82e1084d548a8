"""Taps see every operand once a product, change nothing by themselves, and come off without a trace."""

import copy
import inspect

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import attach, detach, taps_of, watch
from planish.network.batches import call_model, logits_of
from tests.network.zoo import NAMES, build, image, tokens


class Count(nn.Module):
    """The identity, with a count of its calls."""

    def __init__(self, site=None):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class Scale(nn.Module):
    """Multiplies by a learnable number."""

    def __init__(self, site=None, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


def run(model, example):
    return logits_of(call_model(model, example))


# a layer that runs twice sees its input twice, and its weight once a run (and once more where it is tied)
TWICE = {"body.input": 2, "body.weight": 3}


@pytest.mark.parametrize("name", NAMES)
def test_identity_taps_change_nothing_and_are_called_once(name):
    model, example = build(name)
    with torch.no_grad():
        expected = run(model, example)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    taps = attach(model, watch(model, example).products, Count)
    assert list(model.state_dict()) == keys
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for tap in taps.values():
            tap.calls = 0
        with context():
            torch.testing.assert_close(run(model, example).detach(), expected, atol=1e-6, rtol=1e-6)
        assert {site: tap.calls for site, tap in taps.items() if tap.calls != 1} == (TWICE if name == "twice" else {})
    assert dict(taps_of(model)) == taps
    detach(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert not any(key.startswith("_planish") for m in model.modules() for key in m.__dict__)
    with torch.no_grad():
        assert torch.equal(run(model, example), expected)


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_all_parameters_and_all_taps(name):
    model, example = build(name)
    plain = copy.deepcopy(model)
    for one in (plain, model.train()):  # untapped gradients say which parameters the model uses at all
        one.eval()
    products = watch(model, example).products
    taps = attach(model, products, lambda site: Scale(site, 1.0))
    for one in (plain, model):
        run(one, example).square().sum().backward()
    gradients = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert gradients[key].grad is None
        else:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(gradients[key].grad, parameter.grad, atol=1e-4 * scale + 1e-6, rtol=1e-3)
    assert all(tap.factor.grad is not None for tap in taps.values())
    model.train()
    assert run(model, example).requires_grad


@pytest.mark.parametrize("name", ["vit_gray_28", "torchvision_vit", "twice", "test_nfnet", "beit"])
def test_a_copy_is_independent(name):
    model, example = build(name)
    products = watch(model, example).products
    attach(model, products, lambda site: Scale(site, 1.0))
    with torch.no_grad():
        expected = run(model, example)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, example), expected)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        changed = run(twin, example)
        assert not torch.allclose(changed, expected)
        assert torch.equal(run(model, example), expected)
        detach(model)  # the copy keeps its own taps
        assert torch.equal(run(twin, example), changed)
    assert len(list(taps_of(twin))) == len({s.name for p in products for s in p.sites})
    assert not set(map(id, twin.modules())) & set(map(id, model.modules()))


@pytest.mark.parametrize("name", ["vit_gray_28", "test_efficientnet", "hf_vit_sdpa", "torchvision_vit"])
def test_taps_move_with_the_model(name):
    model, example = build(name)
    attach(model, watch(model, example).products, Scale)
    model.to(torch.float64)
    double = {k: v.double() for k, v in example.items()} if isinstance(example, dict) else example.double()
    with torch.no_grad():
        assert run(model, double).dtype == torch.float64
    assert {tap.factor.dtype for _, tap in taps_of(model)} == {torch.float64}


@pytest.mark.parametrize("name", NAMES)
def test_a_tap_at_every_site_has_an_effect(name):
    """Each site alone set to zero must change the output: no tap sits where nothing listens."""
    model, example = build(name)
    products = watch(model, example).products
    with torch.no_grad():
        expected = run(model, example)
        sites = list({site.name: site for product in products for site in product.sites}.values())
        for target in sites[:: max(1, len(sites) // 8)]:
            attach(model, products, lambda site, target=target: Scale(site, -0.5) if site == target else None)
            assert not torch.allclose(run(model, example), expected, atol=1e-7), target.name


def test_an_einsum_over_a_dimension_of_size_one_is_tapped():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 1))

        def forward(self, x):
            return torch.einsum("bnc,oc->bno", x, self.w)

    model, x = Single(), torch.randn(2, 3, 1)
    expected = model(x)
    taps = attach(model, watch(model, x).products, Scale)
    assert set(taps) == {"einsum_operand0", "w"}
    torch.testing.assert_close(model(x), 4 * expected)


def test_values_by_hand():
    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    attach(model, watch(model, x).products, lambda site: Scale(site, 3.0 if site.is_weight else 2.0))
    torch.testing.assert_close(model(x), 6 * x @ model[0]._parameters["weight"].T + model[0].bias)
    torch.testing.assert_close(model(input=x), model(x))


def test_a_model_that_is_one_layer():
    layer, x = nn.Conv2d(3, 4, 3), image(6)
    expected = layer(x)
    taps = attach(layer, watch(layer, x).products, Count)
    assert torch.equal(layer(x), expected)
    assert {name: tap.calls for name, tap in taps.items()} == {"input": 1, "weight": 1}
    assert isinstance(layer, nn.Conv2d)


def test_a_sequential_with_taps_of_its_own_runs_only_its_layers():
    class Gram(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return x @ x.T

    model, x = Gram(nn.Linear(3, 2), nn.ReLU()), torch.randn(4, 3)
    expected = model(x)
    taps = attach(model, watch(model, x).products, Count)
    assert torch.equal(model(x), expected)
    assert {name: tap.calls for name, tap in taps.items()} == dict.fromkeys(
        ["0.input", "0.weight", "matmul_self", "matmul_other"], 1
    )


def test_attaching_again_replaces_the_taps():
    model, example = build("vit_gray_28")
    products = watch(model, example).products
    first = attach(model, products, Count)
    second = attach(model, products, Count)
    run(model, example)
    assert {tap.calls for tap in first.values()} == {0}
    assert {tap.calls for tap in second.values()} == {1}


def test_weights_read_outside_of_their_product_are_the_bare_parameter():
    model, example = build("torchvision_vit")
    attach(model, watch(model, example).products, Scale)
    assert model.heads[0].weight is model.heads[0]._parameters["weight"]
    assert model.encoder.layers[0].self_attention.in_proj_weight.is_leaf


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_pytorchs_inference_kernels_do_not_go_past_the_taps(norm_first, padding):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    example = {"src": tokens()}
    if padding:
        example["src_key_padding_mask"] = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    taps = attach(model, watch(model, example).products, Count)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(**example)
    assert len(taps) == 2 * 12
    assert {tap.calls for tap in taps.values()} == {2}


def test_multihead_attention_in_inference_mode():
    model, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), tokens()
    example = (x, x, x)
    taps = attach(model, watch(model, example).products, Count)
    with torch.inference_mode():
        model(*example)
    assert {name: tap.calls for name, tap in taps.items()} == dict.fromkeys(
        ["linear_input", "in_proj_weight", "attention_qk_query", "attention_qk_key", "attention_av_probabilities",
         "attention_av_value", "linear1_input", "out_proj.weight"], 1,
    )  # fmt: skip


class Branch(nn.Module):
    """Multiplies its input by itself, if told to."""

    def __init__(self):
        super().__init__()
        self.lin, self.on = nn.Linear(4, 4), False

    def forward(self, x):
        x = self.lin(x)
        return x @ x.T if self.on else x


@pytest.mark.parametrize("inside", [False, True])
def test_a_product_that_was_not_there_is_an_error(inside):
    branch, x = Branch(), torch.randn(4, 4)
    model = nn.Sequential(branch) if inside else branch
    attach(model, watch(model, x).products, Count)
    model(x)
    branch.on = True
    with pytest.raises(PlanishError, match="the product matmul in it was not there when the model was watched"):
        model(x)
    detach(model)
    assert model(x).shape == (4, 4)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_product_that_was_not_there_is_noticed_while_it_is_watched_for(encoder):
    branch, x, looking = Branch(), torch.randn(4, 4), []
    model = nn.Sequential(branch, *([nn.TransformerEncoderLayer(4, 1, 8, 0.0)] if encoder else []))
    taps = attach(model, watch(model, x).products, Count, watching=lambda: bool(looking))
    branch.on = True
    if not encoder:  # which is always watched: its fused kernels would go past the taps
        y = nn.functional.linear(x, branch.lin._parameters["weight"], branch.lin.bias)
        assert torch.equal(model(x), y @ y.T)
        assert taps["0.lin.input"].calls == taps["0.lin.weight"].calls == 1
        looking.append(1)
    with pytest.raises(PlanishError, match="was not there when the model was watched"):
        model(x)


def test_idle_taps_leave_fused_attention_alone():
    model, example = build("vit_gray_28")
    taps = attach(model, watch(model, example).products, lambda site: None if site.is_weight else Count(site))
    with torch.profiler.profile() as profile:
        run(model, example)
    assert not any("scaled_dot_product" in event.key for event in profile.key_averages())
    for tap in taps.values():
        tap.idle = True
        tap.calls = 0
    with torch.profiler.profile() as profile:
        run(model, example)
    assert any("scaled_dot_product" in event.key for event in profile.key_averages())
    assert taps["blocks.0.attn.attention_qk_query"].calls == 0
    assert taps["blocks.0.attn.qkv.input"].calls == 1


def test_watching_a_tapped_model_is_an_error():
    model, example = build("test_resnet")
    attach(model, watch(model, example).products, Count)
    with pytest.raises(PlanishError, match="has taps already"):
        watch(model, example)


# what nn.ModuleDict refuses as keys, for they are names of its methods
@pytest.mark.parametrize("name", ["keys", "values", "items", "pop", "clear", "update"])
def test_parameters_may_have_names_of_methods(name):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_parameter(name, nn.Parameter(torch.randn(4, 3)))

        def forward(self, x):
            return self.lin(x) @ getattr(self, name)

    model, x = Odd(), torch.randn(2, 4)
    expected = model(x)
    taps = attach(model, watch(model, x).products, Scale)
    assert {f"planish_taps.{name}.factor", "lin.planish_taps.weight.factor"} <= set(model.state_dict())
    assert dict(taps_of(model)) == taps
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
    assert dict(twin.named_parameters())[f"planish_taps.{name}.factor"] == 3
    assert model.double()(x.double()).dtype == torch.float64
    exported = torch.export.export(model, (x.double(),), strict=False)
    torch.testing.assert_close(exported.module()(x.double()), model(x.double()))
    detach(model)
    torch.testing.assert_close(model.float()(x), expected)


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
def test_parametrized_weights_are_tapped_behind_the_parametrization(wrap):
    model = nn.Sequential(getattr(torch.nn.utils.parametrizations, wrap)(nn.Linear(4, 4))).eval()
    x = torch.randn(2, 4)
    expected = model(x)
    attach(model, watch(model, x).products, lambda site: Scale(site) if site.is_weight else None)
    torch.testing.assert_close(model(x) - model[0].bias, 2 * (expected - model[0].bias))
    detach(model)
    assert torch.equal(model(x), expected)


def test_gradient_checkpointing_keeps_the_taps():
    model, example = build("vit_gray_28")
    taps = attach(model, watch(model, example).products, Scale)
    run(model, example).sum().backward()
    expected = [tap.factor.grad.clone() for tap in taps.values()]
    model.zero_grad()
    model.train()  # no dropout in it; timm checkpoints in training only
    model.set_grad_checkpointing(True)
    run(model, example).sum().backward()
    torch.testing.assert_close([tap.factor.grad for tap in taps.values()], expected)


def test_the_signature_of_a_forward_stays():
    """torch.export reads the names of inputs and the places of dynamic shapes from it."""
    model, example = build("encoder")
    expected = [inspect.signature(module.forward) for module in model.modules()]
    attach(model, watch(model, example).products, Count)
    modules = [module for path, module in model.named_modules() if "planish_taps" not in path]
    assert [inspect.signature(module.forward) for module in modules] == expected


def test_encoders_take_no_shortcut_past_the_taps_and_can_again_afterwards():
    """What PyTorch's encoder asks before it takes its inference kernels, which a compiler's tracing would take, too."""
    model, example = build("encoder")
    layer = model.encoder.layers[0]
    nests, shortcut = model.encoder.use_nested_tensor, layer.activation_relu_or_gelu
    assert shortcut
    taps = attach(model, watch(model, example).products, Count)
    assert not layer.activation_relu_or_gelu
    assert not model.encoder.use_nested_tensor
    assert not copy.deepcopy(model).encoder.layers[0].activation_relu_or_gelu
    detach(model)
    assert (model.encoder.use_nested_tensor, layer.activation_relu_or_gelu) == (nests, shortcut)
    assert taps


@pytest.mark.parametrize("name", ["vit_gray_28", "test_efficientnet"])
def test_a_tapped_model_exports(name):
    model, example = build(name)
    taps = attach(model, watch(model, example).products, lambda site: Scale(site, 1.5))
    exported = torch.export.export(model, (example,), strict=False)
    torch.testing.assert_close(exported.module()(example), model(example))
    assert sum(str(node.target) == "aten.mul.Tensor" for node in exported.graph.nodes) >= len(taps)
