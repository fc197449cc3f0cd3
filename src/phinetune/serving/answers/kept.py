"""Answers that clients want to find again: on the disk before a client hears of them, and there after a restart."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.serving.errors import ApiError
from phinetune.serving.store import Row, Store

RESPONSE, CHAT = "response", "chat.completion"  # kinds, as their objects are called in the API


class KeptAnswers:
    """The answers in a store. All threads may use it."""

    def __init__(self, store: Store, most: int) -> None:
        """Find those that are there.

        Args:
            most: bytes of all answers; the oldest are forgotten.
        """
        self._store, self._most = store, most
        found = store.row("SELECT coalesce(sum(bytes), 0) AS bytes FROM answers") or {}
        self._bytes = int(found["bytes"])

    def put(self, kind: str, body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
        """Keep an answer. It is on the disk when this returns.

        Args:
            body: the answer as the API shows it.
            messages: the conversation that it belongs to.

        Raises:
            ApiError: the disk does not take it.
        """
        created = body.get("created", body.get("created_at"))
        row = {"id": body["id"], "kind": kind, "created_at": created, "model": body["model"]}
        row |= {"body": json.dumps(body), "messages": json.dumps(messages)}
        size = len(row["body"]) + len(row["messages"])
        try:
            with self._store.together():
                self._store.insert("answers", {**row, "bytes": size})
                self._bytes = self._forgotten(self._bytes + size)
        except sqlite3.Error as error:
            raise ApiError(503, f"The answer could not be kept ({error}).", "server_error") from error

    def _forgotten(self, size: int) -> int:
        """Forget the oldest answers while all are larger than they may be; what is left of `size`."""
        while size > self._most:
            oldest = self._store.row("SELECT seq, bytes FROM answers ORDER BY seq LIMIT 1")
            if oldest is None:
                break
            self._store.write("DELETE FROM answers WHERE seq = ?", [oldest["seq"]])
            size -= oldest["bytes"]
        return size

    def find(self, kind: str, id: str) -> Row | None:
        """An answer's row; None if it was not kept, or is forgotten."""
        return self._store.row("SELECT * FROM answers WHERE id = ? AND kind = ?", [id, kind])

    def change(self, row: Row, **values: Any) -> dict[str, Any]:
        """Change keys of an answer's body; the new body."""
        body = {**json.loads(row["body"]), **values}
        self._store.update("answers", row["id"], body=json.dumps(body))
        return body

    def delete(self, row: Row) -> None:
        """Forget an answer."""
        with self._store.together():
            if self._store.write("DELETE FROM answers WHERE seq = ?", [row["seq"]]):
                self._bytes -= row["bytes"]
