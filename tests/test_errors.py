"""What a library raises for a user's input becomes one sentence."""

from __future__ import annotations

import pytest

from phinetune.errors import ConfigError, ModelError, reason_of, told_as


def test_any_error_of_a_library_becomes_a_sentence() -> None:
    for raised in (ValueError("no\n  good"), ZeroDivisionError("no good"), OSError("no good")):
        with pytest.raises(ModelError, match=r"^the file: no good$") as caught, told_as(ModelError, "the file"):
            raise raised
        assert caught.value.__cause__ is raised


def test_our_own_sentences_and_missing_memory_pass() -> None:
    for raised in (ConfigError("as it is"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(raised)) as caught, told_as(ModelError, "the file"):
            raise raised
        assert caught.value is raised


def test_a_reason_is_one_line() -> None:
    assert reason_of(ValueError("a\nb")) == "a b"
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(KeyError("name")) == "KeyError 'name'"
    assert reason_of(ValueError("x" * 500)) == "x" * 300 + " …"
