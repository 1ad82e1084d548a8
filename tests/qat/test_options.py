import pytest

from planish.errors import PlanishError
from planish.qat import METHODS, Method, get_method
from planish.qat.ofq import OFQ
from planish.qat.options import changed_options, option_docs, with_options


def test_values_are_read_as_the_defaults_type():
    method = with_options(OFQ(), ["query-key=no", "annealing=0.25", "weights = lsq", "task=2"])
    assert (method.query_key, method.annealing, method.weights, method.task) == (False, 0.25, "lsq", 2.0)
    assert changed_options(method) == {"weights": "lsq", "task": 2.0, "query_key": False, "annealing": 0.25}
    assert changed_options(OFQ()) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("query_key=maybe", "give true or false"),
        ("annealing=all", "give a number"),
        ("annealing=inf", "give a number"),
        ("band", "NAME=VALUE"),
        ("speed=3", "no option 'speed': its options are weights"),
    ],
)
def test_errors(text, words):
    with pytest.raises(PlanishError, match=words):
        with_options(OFQ(), [text])


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_documented(name):
    method = get_method(name)
    documented = option_docs(type(method))
    from dataclasses import fields

    assert not [f.name for f in fields(method) if not documented.get(f.name)]
    assert isinstance(method, Method)
