from dataclasses import FrozenInstanceError, replace

import pytest

from planish.errors import PlanishError
from planish.scheme import Format, Scheme


@pytest.mark.parametrize(
    ("text", "name", "weights", "activations"),
    [("w4a4", "w4a4", 4, 4), ("W2A8", "w2a8", 2, 8), (" w4A8 ", "w4a8", 4, 8), ("w3", "w3", 3, None)],
)
def test_parse_reads_the_notation(text, name, weights, activations):
    scheme = Scheme.parse(text)
    assert scheme.name == name
    assert scheme.weights == Format(weights, "channel", True, weights == 2, observer="mse")
    assert scheme.activations == (None if activations is None else Format(activations, "tensor", False, observer="mse"))
    assert scheme.edge_bits == 8
    assert Scheme.parse(scheme) is scheme
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize(
    "text", ["w9a0", "banana", "", "w4a", "a4", "w1a4", "w4a16", "w4a4x", "w04", "w\uff14", "w4\na4"]
)
def test_parse_refuses_the_rest_in_one_sentence(text):
    with pytest.raises(PlanishError) as caught:
        Scheme.parse(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "w4a4" in message
    assert "2 to 8" in message
    assert "\n" not in message
    assert message.endswith(".")
    assert message.count(". ") == 0


@pytest.mark.parametrize("value", [None, 4, b"w4a4"])
def test_parse_refuses_what_is_not_text(value):
    with pytest.raises(PlanishError, match="not understood"):
        Scheme.parse(value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 4, "granularity": "row"}, "granularity"),
        ({"bits": 4, "observer": "kl"}, "observer"),
        ({"bits": 2, "symmetric": False, "half_integer": True}, "half_integer"),
        ({"bits": 4, "group_size": 0}, "group_size"),
    ],
)
def test_format_refuses_impossible_fields(fields, word):
    with pytest.raises(PlanishError, match=word):
        Format(**fields)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_range(bits):
    signed, unsigned = Format(bits), Format(bits, symmetric=False)
    assert (signed.qmin, signed.qmax) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    assert signed.offset == unsigned.offset == 0.0
    assert Format(bits, half_integer=True).offset == 0.5


def test_edge_changes_only_the_bits():
    scheme = Scheme.parse("w2a4")
    edge = scheme.edge()
    assert edge.name == "w8a8"
    assert edge.weights == replace(scheme.weights, bits=8, half_integer=False)
    assert edge.activations == replace(scheme.activations, bits=8)
    assert replace(scheme, edge_bits=None).edge() == replace(scheme, edge_bits=None)
    assert replace(scheme, edge_bits=2).edge().weights.half_integer
    assert Scheme.parse("w3").edge().activations is None


@pytest.mark.parametrize("bits", [1, 9, 4.5, "8"])
def test_edge_bits_are_checked(bits):
    with pytest.raises(PlanishError, match="edge_bits"):
        replace(Scheme.parse("w4"), edge_bits=bits)


def test_describe_is_one_line_that_tells_schemes_apart():
    parsed = Scheme.parse("w4a4")
    grouped = replace(parsed.weights, granularity="group", group_size=64)
    schemes = [parsed, Scheme.parse("w2a4"), Scheme.parse("w4"), replace(parsed, edge_bits=None)]
    schemes.append(replace(parsed, weights=grouped))
    lines = [scheme.describe() for scheme in schemes]
    assert len(set(lines)) == len(lines)
    assert all("\n" not in line for line in lines)
    assert lines[0] == (
        "w4a4: weights 4 bits symmetric per channel, range by mse; "
        "activations 4 bits affine per tensor, range by mse; first and last layer 8 bits"
    )
    assert "half-integer" in lines[1]
    assert "activations float" in lines[2]
    assert "as the rest" in lines[3]
    assert "group of 64" in lines[4]


def test_schemes_are_frozen_and_hashable():
    scheme = Scheme.parse("w4a4")
    with pytest.raises(FrozenInstanceError):
        scheme.name = "w5"
    assert len({scheme, Scheme.parse("W4A4")}) == 1


OVERRIDES = (("a.linear", "w2a8"), ("b.linear", "w3"), ("c.attention_qk", "a3"), ("d.linear", "w2a8"))


def test_overrides_are_described_and_change_nothing_when_there_are_none():
    plain = Scheme.parse("w4a4")
    assert plain.overrides == ()
    mixed = replace(plain, overrides=OVERRIDES)
    said = "; but w2a8 for a.linear, d.linear; but w3 for b.linear; but a3 for c.attention_qk"
    assert mixed.describe() == plain.describe() + said
    assert hash(mixed) != hash(plain)
    assert mixed.edge().overrides == OVERRIDES


def test_an_override_keeps_the_kind_of_grid():
    scheme = replace(Scheme.parse("w4a4"), activations=Format(4, "token", symmetric=False, observer="minmax"))
    at = scheme.at("w3a6")
    assert at.weights == replace(scheme.weights, bits=3)
    assert at.activations == replace(scheme.activations, bits=6)
    assert scheme.at("w4a4").weights == scheme.weights
    assert scheme.at("w3").activations is None
    assert scheme.at("a3").weights == scheme.weights
    assert Scheme.parse("w3").at("w4a5").activations == Format(5, "tensor", symmetric=False)


def test_two_bits_are_half_integer_unless_the_scheme_has_two_bits_of_another_kind():
    assert Scheme.parse("w4a4").at("w2a4").weights == Scheme.parse("w2a4").weights
    assert Scheme.parse("w2a4").at("w4a4").weights == Scheme.parse("w4a4").weights
    assert Scheme.parse("w4a2").at("w4a4").activations == Scheme.parse("w4a4").activations
    other = replace(Scheme.parse("w2"), weights=Format(2, "channel"))
    assert not other.at("w2").weights.half_integer
    affine = replace(Scheme.parse("w4"), weights=Format(4, "channel", symmetric=False))
    assert not affine.at("w2").weights.half_integer


@pytest.mark.parametrize("notation", ["", "w9a4", "w3b4", "a", "W3A4x", "4", None, "a4w3"])
def test_overrides_that_are_not_understood(notation):
    with pytest.raises(PlanishError, match=r"of block\.linear is not understood: write w3a4, w3 .* or, .* a4"):
        replace(Scheme.parse("w4a4"), overrides=(("block.linear", notation),))


def test_a_product_is_overridden_once():
    with pytest.raises(PlanishError, match=r"name 'a\.linear' more than once"):
        replace(Scheme.parse("w4a4"), overrides=(*OVERRIDES, ("a.linear", "w2a8")))
