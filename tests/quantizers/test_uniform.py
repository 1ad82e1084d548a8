import copy

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.quantizers import UniformQuantizer, fit_grid
from planish.scheme import Format

FORMATS = [
    Format(4, "channel"),
    Format(4, symmetric=False),
    Format(2, "channel", half_integer=True),
    Format(4, "group", group_size=4),
    Format(4, "token", symmetric=False),
]


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.describe())
def test_forward_and_state_dict_round_trip(format):
    x = normal(6, 8)
    quantizer = UniformQuantizer(format).fit(x)
    grid = fit_grid(x, format)
    assert torch.equal(quantizer(x), fake_quantize(x, grid))
    state = torch.nn.Sequential(quantizer).state_dict()
    assert set(state) == {"0.scale", "0.zero_point"}
    for assign in (False, True):
        fresh = torch.nn.Sequential(UniformQuantizer(format))
        fresh.load_state_dict(state, assign=assign)
        assert torch.equal(fresh(x), quantizer(x))
        assert fresh[0].fitted
    other = UniformQuantizer(format).fit(normal(3, 4))  # fitted, but to another shape
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))


def test_channel_axis_is_used():
    x = normal(3, 5)
    quantizer = UniformQuantizer(Format(4, "channel"), channel_axis=1).fit(x)
    assert quantizer.scale.shape == (1, 5)


def test_an_unfitted_quantizer_says_so():
    quantizer = UniformQuantizer(Format(4))
    assert not quantizer.fitted
    assert "not fitted" in repr(quantizer)
    with pytest.raises(PlanishError, match="call fit"):
        quantizer(torch.ones(3))
    again = UniformQuantizer(Format(4))
    again.load_state_dict(quantizer.state_dict())
    assert not again.fitted


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive_and_finite(bad):
    quantizer = UniformQuantizer(Format(4, "channel")).fit(normal(3, 5))
    kept = quantizer.scale.clone()
    scale = quantizer.scale.clone()
    scale[1] = bad
    with pytest.raises(PlanishError, match="1 of 3 scales"):
        quantizer.grid = quantizer.grid._replace(scale=scale)
    assert torch.equal(quantizer.scale, kept)
    with pytest.raises(RuntimeError, match="scale: 1 of 3 scales"):
        UniformQuantizer(Format(4, "channel")).load_state_dict({"scale": scale, "zero_point": quantizer.zero_point})


def test_a_grid_of_another_format_is_refused():
    quantizer = UniformQuantizer(Format(4))
    with pytest.raises(PlanishError, match="same format"):
        quantizer.grid = fit_grid(normal(9), Format(3))
    quantizer.grid = Grid(torch.tensor(0.5), torch.tensor(0.0), -8, 7)
    assert quantizer(torch.tensor([0.6])).item() == 0.5


def test_missing_keys_are_reported():
    with pytest.raises(RuntimeError, match="zero_point"):
        UniformQuantizer(Format(4)).load_state_dict({"scale": torch.tensor(1.0)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_buffers_stay_float32(dtype):
    x = normal(6, 8)
    quantizer = UniformQuantizer(Format(4, "channel")).fit(x)
    scale = quantizer.scale.clone()
    quantizer.to(dtype)
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer.scale, scale)
    assert quantizer(x.to(dtype)).dtype == dtype
    assert quantizer.to("meta").scale.is_meta


def test_repr_says_what_it_is():
    x = normal(64, 32)
    assert UniformQuantizer(Format(4, "channel")).fit(x).extra_repr() == "4 bits channel symmetric, 64 scales"
    assert UniformQuantizer(Format(4, symmetric=False)).fit(x).extra_repr() == "4 bits tensor affine, 1 scale"
    group = UniformQuantizer(Format(2, "group", half_integer=True, group_size=8)).fit(x)
    assert group.extra_repr() == "2 bits group half-integer, 256 scales"


def test_compiles_and_exports():
    x = normal(6, 8)
    quantizer = UniformQuantizer(Format(4, "channel")).fit(x)
    exported = torch.export.export(quantizer, (x,))
    assert torch.equal(exported.module()(x), quantizer(x))
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = compiled(y)
    assert torch.equal(out, quantizer(x))
    (out * x).sum().backward()
    (quantizer(z) * x).sum().backward()
    assert torch.equal(y.grad, z.grad)
