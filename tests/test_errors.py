"""What a library raises for a user's input becomes one sentence."""

from __future__ import annotations

import errno

import pytest

from phinetune.errors import ConfigError, MachineError, ModelError, is_machine_fault, reason_of, told_as


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


@pytest.mark.parametrize(
    ("cause", "is_one"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (MachineError("no space is left"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (ValueError("out of memory"), False),
    ],
    ids=repr,
)
def test_what_the_machine_refused_is_known_behind_a_sentence(cause: Exception, is_one: bool) -> None:
    with pytest.raises(ModelError) as caught:
        raise ModelError("the file can't be read") from cause
    assert (is_machine_fault(caught.value), is_machine_fault(cause)) == (is_one, is_one)
