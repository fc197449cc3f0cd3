"""The base of all sections of the configuration: a pydantic model that refuses unknown keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from phinetune.errors import unknown_key


class Section(BaseModel):
    """A group of knobs. An unknown key is refused, and the error names the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def one_of(*known: str) -> AfterValidator:
    """A validator for a text that must be one of some names. Its error message is pydantic's for a `Literal`."""

    def check(value: str) -> str:
        if value not in known:
            listed = [repr(name) for name in known]
            raise PydanticCustomError(
                "literal_error", "Input should be {expected}", {"expected": f"{', '.join(listed[:-1])} or {listed[-1]}"}
            )
        return value

    return AfterValidator(check)


Entry = TypeVar("Entry", bound=Section)


def checked_entry(kind: type[Entry], entry: Mapping[str, Any], where: str) -> Entry:
    """Validate an entry of a list.

    Args:
        where: what error messages call the entry.

    Raises:
        ValueError: the entry has mistakes; one sentence names all of them.
    """
    try:
        return kind.model_validate(dict(entry))
    except ValidationError as error:
        raise ValueError("; ".join(entry_sentence(kind, where, problem) for problem in error.errors())) from None


def joined_message(messages: Sequence[str]) -> str:
    """One message for a value that is of none of the kinds that its knob takes; pydantic has one for each kind.

    Args:
        messages: pydantic's, at least one.
    """
    told = [re.sub(r", (unable to|got a) .*", "", message.removeprefix("Value error, ")) for message in messages]
    told.sort()  # the order of a union's kinds is that in which some library first wrote it
    rest = [message.removeprefix("Input should be ") for message in told[1:]]
    return ", or ".join(dict.fromkeys([told[0], *rest]))


def entry_sentence(kind: type[Section], where: str, problem: Any) -> str:
    """The sentence for one of pydantic's errors."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return f"{where}: {message}"
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return unknown_key(where, key, kind.model_fields)
    return f"{where}: {key}: {message}"
