"""The ledger adds up, and knows the sizes of images that models take."""

import pytest
import torch
from torch import nn

import planish
from planish.errors import PlanishError
from planish.network import ledger, watch
from planish.network.ledger import example_for
from tests.network.zoo import NAMES, build


@pytest.mark.parametrize("name", NAMES)
def test_shares_add_up(name):
    model, example = build(name)
    for scheme in (None, "w4a4", "w3"):
        book = ledger(model, scheme, example=example)
        assert sum(book.shares.values()) == pytest.approx(1)
        assert book.macs == sum(product.macs for product in watch(model, example).products)
    assert {row.bits for row in ledger(model, example=example).rows} == {None}


def test_rows_and_precisions():
    model, example = build("vit_gray_28")
    book = ledger(model, "w3a4", example=example)
    rows = {row.site: row for row in book.rows}
    assert (rows["patch_embed.proj.weight"].bits, rows["head.input"].bits) == (8, 8)
    weight, probabilities = rows["blocks.1.mlp.fc1.weight"], rows["blocks.0.attn.attention_av_probabilities"]
    assert (weight.bits, weight.granularity, weight.role, weight.operator) == (3, "channel", "weight", "linear")
    assert (probabilities.bits, probabilities.granularity, probabilities.role) == (4, "tensor", "operand")
    assert set(book.shares) == {"w8a8", "w3a4", "a4a4"}
    # of 17 tokens of width 32: by hand
    layer, attention = 17 * (32 * 96 + 32 * 32 + 2 * 32 * 128), 2 * 17 * 17 * 32
    edges = 16 * 49 * 32 + 32 * 5
    assert book.macs == 2 * (layer + attention) + edges
    assert book.shares["a4a4"] == pytest.approx(2 * attention / book.macs)
    assert book.shares["w8a8"] == pytest.approx(edges / book.macs)
    assert set(ledger(model, "w3", example=example).shares) == {"w3", "w8", "float"}


def test_table():
    model, example = build("test_resnet")
    lines = str(ledger(model, "w4a8", example=example)).splitlines()
    rows = ledger(model, "w4a8", example=example).rows
    assert lines[0].split() == ["site", "operator", "bits", "granularity", "share", "of", "MACs"]
    assert len(lines) == 2 + len(rows) + 1
    assert lines[2].split()[:4] == ["conv1.0.input", "conv2d", "8", "tensor"]
    assert "multiply-accumulates for one image: w4a8" in lines[-1]
    assert all(row["share"] >= 0 for row in ledger(model, "w4a8", example=example).as_dicts())


def test_of_a_quantized_model():
    model, example = build("test_efficientnet")
    book = planish.ledger(planish.quantize(model, [example], "w4a4"))
    assert book.shares == ledger(model, "w4a4", example=example).shares
    assert {row.tap for row in book.rows} == {"UniformQuantizer"}
    with pytest.raises(PlanishError, match="has taps already"):
        ledger(planish.quantize(model, [example], "w4a4"), "w3", example=example)


def test_what_the_caller_allows_stays_in_the_ledger():
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 4, batch_first=True))
    x = torch.randn(2, 5, 6)
    with pytest.raises(PlanishError, match="no tap can reach"):
        ledger(model, example=x)
    book = ledger(model, "w4a4", example=x, allow="1")
    assert {row.role for row in book.rows if row.bits is None} == {"unreachable"}
    assert book.shares == {
        "float": pytest.approx(40 / 49),
        "w8a8": pytest.approx(9 / 49),
    }  # 4 * 4 * (6 + 4) against 6 * 6
    assert sum(book.shares.values()) == pytest.approx(1)
    assert any(row.role == "unreachable" for row in book.rows)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("vit_gray_28", (1, 1, 28, 28)), ("deit", (1, 3, 32, 32)), ("swin", (1, 3, 32, 32)), ("eva", (1, 3, 32, 32)),
     ("test_vit", (1, 3, 160, 160)), ("hf_vit_sdpa", (1, 3, 32, 32)), ("torchvision_vit", (1, 3, 32, 32))],
)  # fmt: skip
def test_example_for(name, shape):
    model, _ = build(name)
    example = example_for(model)
    assert tuple(example.shape) == shape
    assert planish.ledger(model, "w4a4").macs > 0


def test_example_takes_dtype_of_the_model():
    assert example_for(build("vit_gray_28")[0].double()).dtype == torch.float64


def test_gray_convnets():
    import timm

    model = timm.create_model("test_resnet", in_chans=1, num_classes=3)
    assert example_for(model).shape[:2] == (1, 1)


def test_a_model_that_does_not_say_what_it_takes():
    with pytest.raises(PlanishError, match=r"Sequential does not say what images it takes; pass example="):
        planish.ledger(nn.Sequential(nn.Conv2d(3, 4, 3)))
