"""Answers that are, or hold, JSON: can it be read, and which fields are as in the reference."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

TRIES = 20  # brackets at which JSON may begin: an answer that goes in circles has thousands
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


class _Nothing:
    """No JSON there; None would be JSON's null."""


NOTHING = _Nothing()


def read(text: str) -> Any:
    """The JSON that a text is, or else the first object or list in it (in a code fence, after a friendly line)."""
    found = _whole(text)
    if found is not NOTHING:
        return found
    fenced = FENCE.search(text)
    if fenced and (found := _whole(fenced.group(1))) is not NOTHING:
        return found
    decoder = json.JSONDecoder()
    for match in itertools.islice(re.finditer(r"[{\[]", text), TRIES):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (json.JSONDecodeError, RecursionError):
            continue
    return NOTHING


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return NOTHING


def valid(answer: str, reference: str) -> float | None:
    """100 where the answer's JSON can be read; None where the reference holds none.

    A reference that is JSON from its first letter to its last wants an answer that is; one that holds an object or a
    list among words wants one that holds some.
    """
    if not _is_tree(read(reference)):
        return None
    found = _whole(answer) if _whole(reference) is not NOTHING else read(answer)
    return 100.0 * _is_tree(found)


def fields(answer: str, reference: str) -> float | None:
    """Percent of the reference's fields that the answer has with the same value; None without a JSON object there."""
    wanted = fields_right(answer, reference)
    return 100.0 * sum(wanted.values()) / len(wanted) if wanted else None


def fields_right(answer: str, reference: str) -> dict[str, bool]:
    """For each field of the reference's JSON object (`a.b` for nested ones): whether the answer's is equal."""
    wanted, found = read(reference), read(answer)
    if not isinstance(wanted, Mapping):
        return {}
    got = dict(_flat(found)) if isinstance(found, Mapping) else {}
    return {key: key in got and _same(got[key], value) for key, value in _flat(wanted)}


def field_shares(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Percent of the references with a field whose answer has it right, by field, over (answer, reference) pairs."""
    counts: dict[str, list[bool]] = {}
    for answer, reference in pairs:
        for key, right in fields_right(answer, reference).items():
            counts.setdefault(key, []).append(right)
    return {key: 100.0 * sum(right) / len(right) for key, right in counts.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same(left: Any, right: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _is_tree(value: Any) -> bool:
    return isinstance(value, (dict, list))
