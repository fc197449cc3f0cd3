"""Scores answers that are JSON or contain JSON: can it be read, and which fields equal those of the reference?"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

TRIES = 20  # brackets that are tried as the start of JSON; an answer that repeats itself can have thousands
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


class _Nothing:
    """The type of `NOTHING`, which says that there is no JSON. None would mean JSON's null."""


NOTHING = _Nothing()


def read(text: str) -> Any:
    """The JSON value in a text; `NOTHING` if there is none.

    It is the whole text, or the text in the first code fence, or else the first object or list in the text.
    """
    found = _parse(text)
    if found is not NOTHING:
        return found
    fenced = FENCE.search(text)
    if fenced and (found := _parse(fenced.group(1))) is not NOTHING:
        return found
    decoder = json.JSONDecoder()
    for match in itertools.islice(re.finditer(r"[{\[]", text), TRIES):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (json.JSONDecodeError, RecursionError):
            continue
    return NOTHING


def _parse(text: str) -> Any:
    """The JSON value of the whole text; `NOTHING` if it is not JSON."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return NOTHING


def valid(answer: str, reference: str) -> float | None:
    """100 if the answer's JSON can be read, else 0. None if the reference contains no JSON object or list.

    If the whole reference is JSON, the whole answer must be JSON. If the reference has other text around the JSON, the
    answer may have too.
    """
    if not _is_object_or_list(read(reference)):
        return None
    found = _parse(answer) if _parse(reference) is not NOTHING else read(answer)
    return 100.0 * _is_object_or_list(found)


def fields(answer: str, reference: str) -> float | None:
    """The percentage of the reference's fields that the answer has with the same value. None if there are no fields."""
    wanted = fields_right(answer, reference)
    return 100.0 * sum(wanted.values()) / len(wanted) if wanted else None


def fields_right(answer: str, reference: str) -> dict[str, bool]:
    """For each field of the reference's JSON object, whether the answer's is equal. Nested fields are named `a.b`."""
    wanted, found = read(reference), read(answer)
    if not isinstance(wanted, Mapping):
        return {}
    got = dict(_flat_fields(found)) if isinstance(found, Mapping) else {}
    return {key: key in got and _equal_in_json(got[key], value) for key, value in _flat_fields(wanted)}


def field_shares(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """For each field, how many answers have it right, in percent of the references that have the field.

    Args:
        pairs: (answer, reference) pairs.
    """
    counts: dict[str, list[bool]] = {}
    for answer, reference in pairs:
        for key, right in fields_right(answer, reference).items():
            counts.setdefault(key, []).append(right)
    return {key: 100.0 * sum(right) / len(right) for key, right in counts.items()}


def _flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (name, value) pairs of an object and of the objects in it."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat_fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _equal_in_json(left: Any, right: Any) -> bool:
    """Whether two values are equal as JSON, where true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _is_object_or_list(value: Any) -> bool:
    return isinstance(value, (dict, list))
