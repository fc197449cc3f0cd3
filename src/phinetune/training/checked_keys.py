"""Checks a dictionary against one of the libraries' dataclasses: its keys, the types of its values, and our rules."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from phinetune.config.section import joined_message
from phinetune.errors import unknown_key
from phinetune.training.value_rules import STRATEGIES, broken_rule

# Keys for which the library takes more values than its annotation lists (`pissa_niter_16`).
OPEN_ENDED = ("init_lora_weights",)
# Keys that take another type here than the library says.
WIDER = {"resume_from_checkpoint": bool | str | None, "fsdp": bool | str | list[str] | None}
SECRET = "hub_token"  # its value is never shown
# Keys of which null means the default. Elsewhere null has a meaning of its own, or is refused.
NULL_IS_DEFAULT = ("alpha_pattern", "loftq_config", "rank_pattern", "report_to")
# Keys of which an empty text or list means that nothing is asked for, as it does for their library.
EMPTY_IS_NULL = (
    "debug",
    "deepspeed",
    "exclude_modules",
    "fsdp",
    "layers_pattern",
    "modules_to_save",
    "optim_args",
    "report_to",
    "target_parameters",
)


def checked(
    where: str, schema: type, given: Mapping[str, Any], older: Iterable[str], problems: list[str]
) -> dict[str, Any]:
    """The keys that the schema knows, with values of its types that keep our rules.

    Args:
        where: `training_config` or `peft_config`.
        schema: a dataclass.
        older: names that are translated elsewhere; a misspelt key may be near to one of them.
        problems: a sentence is added to it for each key that is not in the result.
    """
    hints = _hints(schema) | WIDER
    known = {field.name for field in dataclasses.fields(schema)}
    good: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            problems.append(unknown_key(where, key, known | set(older)))
        elif not _asks_for_nothing(key, value):
            found, problem = _read(key, value, hints[key])
            if problem:
                shown = "" if key == SECRET else f" (given: {value!r})"
                problems.append(f"{where}.{key}: {problem}{shown}")
            else:
                good[key] = found
    return good


@cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _asks_for_nothing(key: str, value: Any) -> bool:
    return (value is None and key in NULL_IS_DEFAULT) or (value in ("", [], ()) and key in EMPTY_IS_NULL)


def _read(key: str, value: Any, hint: Any) -> tuple[Any, str | None]:
    """The value as the library takes it, or what is wrong with it as the end of a sentence."""
    if key in OPEN_ENDED:
        return value, None
    if key in STRATEGIES and value is False:
        return "no", None
    if value == "" or (isinstance(value, (list, tuple)) and "" in value):
        return None, "it should not be empty; leave the key out"
    if key.endswith("_kwargs") and isinstance(value, str) and not value.startswith("{"):
        return None, "it should be a valid dictionary"
    if isinstance(value, dict) and (problem := _unknown_part(value, hint)):
        return None, problem
    try:
        coerced = _coerce(value, hint)
    except ValidationError as error:
        deepest = max(len(one["loc"]) for one in error.errors())
        messages = [one["msg"] for one in error.errors() if len(one["loc"]) == deepest]
        return None, joined_message(messages).replace("Input should", "it should")
    if isinstance(value, bool) and not isinstance(coerced, (bool, str)):
        return None, "it should be a number"
    return coerced, broken_rule(key, coerced)


def _coerce(value: Any, hint: Any) -> Any:
    """The value in the schema's type, if that is a number, a text or a boolean (YAML reads `5e-6` as text). Else the
    value as it was given.
    """
    found = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    return found if type(found) in (bool, int, float, str) else value


def _unknown_part(value: Mapping[str, Any], hint: Any) -> str | None:
    """The problem with a dictionary for one of PEFT's small dataclasses, which would overlook a key that it lacks."""
    kinds = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
    if not kinds:
        return None
    known = [field.name for field in dataclasses.fields(kinds[0])]
    found = [key for key in value if key not in known]
    return f"there is no key `{found[0]}` in it (there are {', '.join(known)})" if found else None
