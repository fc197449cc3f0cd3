"""Lists in pieces, with cursors, as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from phinetune.serving.errors import ApiError
from phinetune.serving.store import Row, Store

if TYPE_CHECKING:
    from fastapi import Request


def page(
    store: Store,
    table: str,
    show: Callable[[Row], dict[str, Any]],
    *,
    after: str | None,
    limit: int,
    where: Sequence[str] = (),
    values: Sequence[Any] = (),
    oldest_first: bool = False,
) -> dict[str, Any]:
    """A piece of a table, newest first, as the API shows it.

    Args:
        after: the id of the last object of the piece before.
        where: conditions, which this program wrote; `values` are for their marks.

    Raises:
        ApiError: there is no object `after`.
    """
    conditions, marks = list(where), list(values)
    if after is not None:
        last = store.row(f"SELECT seq FROM {table} WHERE {' AND '.join(['id = ?', *where])}", [after, *values])
        if last is None:
            raise _no_such(after)
        conditions.append("seq > ?" if oldest_first else "seq < ?")
        marks.append(last["seq"])
    clause = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    order = "ASC" if oldest_first else "DESC"
    rows = store.rows(f"SELECT * FROM {table} {clause} ORDER BY seq {order} LIMIT ?", [*marks, limit + 1])
    return _listed([show(row) for row in rows[:limit]], len(rows) > limit)


def metadata_conditions(request: Request, column: str) -> tuple[list[str], list[Any]]:
    """`metadata[key]=value` and `metadata=null` of a query, as conditions for `page`, and the values for their marks.

    Args:
        column: holds a JSON object with the key `metadata`.
    """
    where: list[str] = []
    values: list[Any] = []
    for name, value in request.query_params.multi_items():
        if name == "metadata" and value == "null":
            where.append(f"json_extract({column}, '$.metadata') IS NULL")
        elif name.startswith("metadata[") and name.endswith("]"):
            where.append(f"EXISTS (SELECT 1 FROM json_each({column}, '$.metadata') WHERE key = ? AND value = ?)")
            values += [name[len("metadata[") : -1], value]
    if len(where) > 16:
        raise ApiError(400, "At most 16 conditions on metadata.", param="metadata")
    return where, values


def piece(items: Sequence[dict[str, Any]], *, after: str | None, limit: int, backwards: bool = False) -> dict[str, Any]:
    """A piece of a list in memory, in the same form.

    Raises:
        ApiError: there is no object `after`.
    """
    ordered = list(reversed(items)) if backwards else list(items)
    ids = [item["id"] for item in ordered]
    if after is not None and after not in ids:
        raise _no_such(after)
    left = ordered[ids.index(after) + 1 :] if after is not None else ordered
    return _listed(left[:limit], len(left) > limit)


def _listed(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": has_more}


def _no_such(after: str) -> ApiError:
    return ApiError(404, f"No object with id '{after}' to go on after.", param="after")
