"""A sentence stays a sentence, whatever process it comes from, and commands no terminal."""

import pytest
from torch._utils import ExceptionWrapper

from planish.errors import PlanishError, printable


def test_what_a_worker_process_raises_is_the_sentence_alone():
    sentence = "a/b.png cannot be read (KeyError: 'x'): planish: put it back"
    try:
        try:
            raise OSError("first\nlines")
        except OSError as error:
            raise PlanishError(sentence) from error
    except PlanishError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(PlanishError) as caught:
        wrapped.reraise()
    assert str(caught.value) == sentence
    assert str(PlanishError("Caught a cold")) == "Caught a cold"


def test_control_characters_are_spelled_out():
    assert printable("a\x1b]0;t\x07\nb\u202ec é") == "a\\x1b]0;t\\x07\\nb\\u202ec é"
