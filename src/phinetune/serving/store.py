"""What a server must not lose, in one SQLite file: files, jobs with their events, models, answers, votes, exports.

A call returns when what it wrote is on the disk (WAL, `synchronous=FULL`). One connection serves all threads, one after
the other, and one server has the file at a time.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phinetune.errors import RunError

DATABASE = "server.sqlite"
_TABLES = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, bytes INTEGER NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, form TEXT, rows INTEGER, notes TEXT NOT NULL DEFAULT '[]'
);
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, status TEXT NOT NULL,
    request TEXT NOT NULL, model TEXT NOT NULL, base TEXT NOT NULL, adapter TEXT, base_id TEXT NOT NULL,
    suffix TEXT NOT NULL, seed INTEGER NOT NULL, training_file TEXT NOT NULL, validation_file TEXT,
    chosen TEXT NOT NULL DEFAULT '{}', memory INTEGER, seconds REAL, process TEXT, deaths INTEGER NOT NULL DEFAULT 0,
    told_step INTEGER NOT NULL DEFAULT 0, told_valid INTEGER NOT NULL DEFAULT 0, waits_for TEXT, fine_tuned_model TEXT,
    finished_at INTEGER, estimated_finish INTEGER, trained_tokens INTEGER, result_files TEXT NOT NULL DEFAULT '[]',
    error TEXT
);
CREATE INDEX jobs_by_status ON jobs (status);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, created_at INTEGER NOT NULL,
    level TEXT NOT NULL, message TEXT NOT NULL, type TEXT NOT NULL, data TEXT
);
CREATE INDEX events_of_job ON events (job, seq);
CREATE TABLE checkpoints (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, created_at INTEGER NOT NULL,
    step INTEGER NOT NULL, model TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE (job, step)
);
CREATE TABLE models (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, base TEXT NOT NULL,
    folder TEXT NOT NULL, job TEXT NOT NULL, deleted INTEGER NOT NULL DEFAULT 0
);
"""
# What each version of the tables has more than the one before. `_TABLES` are version 1.
_UPGRADES = {
    2: """
CREATE TABLE answers (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, created_at INTEGER NOT NULL,
    model TEXT NOT NULL, body TEXT NOT NULL, messages TEXT NOT NULL, bytes INTEGER NOT NULL
);
CREATE TABLE votes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, messages TEXT NOT NULL,
    preferred_model TEXT NOT NULL, preferred TEXT NOT NULL, other_model TEXT NOT NULL, other TEXT NOT NULL,
    equal INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE exports (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, status TEXT NOT NULL,
    model TEXT NOT NULL, folder TEXT NOT NULL, request TEXT NOT NULL, process TEXT, finished_at INTEGER, result TEXT,
    error TEXT
);
""",
    3: "ALTER TABLE jobs ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0;",
}
VERSION = max(_UPGRADES)  # of the tables
Row = dict[str, Any]


class Store:
    """The tables of a server, as rows that are dictionaries."""

    def __init__(self, path: Path) -> None:
        """Open a file, or make it.

        Raises:
            RunError: it is of a newer version, or no such file.
        """
        self.path = path
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            path.chmod(0o600)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._make_tables()
        except sqlite3.DatabaseError as error:
            raise RunError(f"{path}: can't be read as a server's state ({error}); move it away to begin anew") from None

    def _make_tables(self) -> None:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise RunError(
                f"{self.path}: written by a newer phinetune (tables {version}, this one knows {VERSION}); update "
                "phinetune, or name another folder with --folder"
            )
        scripts = [_TABLES] if version == 0 else []
        scripts += [script for number, script in _UPGRADES.items() if number > version]
        if scripts:
            self._connection.executescript(f"BEGIN; {' '.join(scripts)} PRAGMA user_version={VERSION}; COMMIT;")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context whose changes are written all or not at all."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        """The rows that a query finds."""
        with self._lock:
            return [dict(row) for row in self._connection.execute(query, values).fetchall()]

    def row(self, query: str, values: Sequence[Any] = ()) -> Row | None:
        """The first row that a query finds."""
        return next(iter(self.rows(query, values)), None)

    def write(self, query: str, values: Sequence[Any] = ()) -> int:
        """Change rows; the number of those changed."""
        with self._lock:
            return self._connection.execute(query, values).rowcount

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        """Add a row to a table.

        Args:
            table, row: names that this program wrote, and values from anywhere.
        """
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        self.write(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))

    def update(self, table: str, id: str, **values: Any) -> None:
        """Change columns of the row with an id."""
        columns = ", ".join(f"{name} = ?" for name in values)
        self.write(f"UPDATE {table} SET {columns} WHERE id = ?", [*values.values(), id])

    def close(self) -> None:
        with self._lock:
            self._connection.close()
