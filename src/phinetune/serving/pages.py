"""Lists in pieces, with cursors, as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from phinetune.serving.errors import ApiError
from phinetune.serving.store import Row, Store


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
            raise ApiError(404, f"No object with id '{after}' to go on after.", param="after")
        conditions.append("seq > ?" if oldest_first else "seq < ?")
        marks.append(last["seq"])
    clause = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    order = "ASC" if oldest_first else "DESC"
    rows = store.rows(f"SELECT * FROM {table} {clause} ORDER BY seq {order} LIMIT ?", [*marks, limit + 1])
    data = [show(row) for row in rows[:limit]]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(rows) > limit}
