"""Whether an answer's SQL gives the result of its reference's, by running both in SQLite.

Text alone does not tell: two queries may look alike and differ, or look different and say the same. So both run on the
same rows, as in the execution accuracy of Spider (Yu et al. 2018). Tables without rows are filled, three times in other
ways, with values that the reference speaks of among others (the idea of test suites, Zhong et al. 2020): on empty
tables any two queries would agree.

A model's SQL is nobody's to trust. It runs in a database in memory that may only be read: an authorizer lets selecting
pass and nothing else, and steps, rows and lengths are bounded.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from phinetune.chats.template import Message
from phinetune.config.own_metrics import FROM_PROMPT
from phinetune.errors import ConfigError

STEPS = 2_000_000  # of SQLite's machine that a query may take, a fraction of a second; counted, so no clock decides
CHECKED = 10_000  # steps between two looks at that count
ROWS = 10_000  # of a result
LENGTH = 1_000_000  # bytes of a value or a row
FILLS = 3  # ways in which empty tables are filled
FILLED = 12  # rows of a table
# What a query may do. Everything else is refused: writing, attaching files, pragmas, virtual tables.
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
# What no script of tables may do.
NEVER = {
    sqlite3.SQLITE_ATTACH,
    sqlite3.SQLITE_DETACH,
    sqlite3.SQLITE_PRAGMA,
    sqlite3.SQLITE_CREATE_VTABLE,
    sqlite3.SQLITE_DROP_VTABLE,
}
# Functions that reach out of the database, make huge values at once, or give another result each time.
NO_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob", "randomblob", "random"}
# Statements that a script of tables may hold.
MAKES = re.compile(r"(?:CREATE\s+(?:TABLE|VIEW|INDEX|UNIQUE\s+INDEX)|INSERT\s+INTO)\b", re.IGNORECASE)
QUERY = re.compile(r"\b(?:SELECT|WITH)\b", re.IGNORECASE)
FENCE = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
LITERAL = re.compile(r"'((?:[^']|'')*)'|\"([^\"]*)\"|(?<![\w.])(\d+(?:\.\d+)?)(?![\w.])")

Result = list[tuple[Any, ...]]


class SqlResult:
    """100 if the answer's query gives the reference's result, else 0. None if the reference's query itself can't run.

    Rows count in any order unless the reference orders them; the columns' names do not matter.

    Args:
        name: the metric's, for errors.
        place: a file of CREATE TABLE and INSERT statements, or `FROM_PROMPT` for those in each chat's messages.

    Raises:
        ConfigError: there is no such file, or SQLite refuses a statement of it.
    """

    runs_references = True

    def __init__(self, name: str, place: str) -> None:
        self.script: str | None = None
        if place == FROM_PROMPT:
            return
        where = f"evaluation.metrics: `{name}`: {place}"
        try:
            self.script = Path(place).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: can't be read: {error}; name a file, or `{FROM_PROMPT}`") from None
        try:
            with _database(self.script):
                pass
        except sqlite3.Error as error:
            raise ConfigError(f"{where}: SQLite refuses it: {error}") from None

    def __call__(self, answer: str, reference: str, messages: Sequence[Message]) -> float | None:
        script = self.script if self.script is not None else _script_in(messages)
        wanted = query_in(reference)
        expected = _results(script, wanted, wanted)
        if None in expected:
            return None
        found = _results(script, query_in(answer), wanted)
        ordered = _is_ordered(wanted)
        return 100.0 * all(_agree(a, b, ordered) for a, b in zip(expected, found, strict=True))


def query_in(text: str) -> str:
    """The query in an answer: in its code fence if it has one, from the first SELECT or WITH up to its semicolon."""
    fenced = FENCE.search(text)
    text = fenced.group(1) if fenced else text
    start = QUERY.search(text)
    return next(_statements(text[start.start() :]), "") if start else ""


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, cut at the semicolons that end them."""
    begun = ""
    for part in re.split(r"(?<=;)", script):
        begun += part
        if sqlite3.complete_statement(begun):
            yield begun.strip()
            begun = ""
    if begun.strip():
        yield begun.strip()


def _script_in(messages: Sequence[Message]) -> str:
    """The CREATE and INSERT statements in a chat's messages: each up to its semicolon, its closing bracket or a blank
    line.
    """
    text = "\n\n".join(message["content"] or "" for message in messages)
    found = []
    for match in MAKES.finditer(text):
        rest = re.split(r"\n\s*\n", text[match.start() :], maxsplit=1)[0]
        following = MAKES.search(rest, match.end() - match.start())
        found.append(_one_statement(rest[: following.start()] if following else rest))
    return "\n".join(f"{statement};" for statement in found)


def _one_statement(text: str) -> str:
    """A statement without what follows it: it ends with its semicolon, or for CREATE TABLE with its last bracket."""
    statement = next(_statements(text), "").rstrip("; \n")
    if not statement.upper().startswith("CREATE") or ")" not in statement:
        return statement
    depth = 0
    for place, letter in enumerate(statement):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == ")" and depth == 0:
            return statement[: place + 1]
    return statement


@contextlib.contextmanager
def _database(script: str) -> Iterator[sqlite3.Connection]:
    """A database in memory with the tables of a script. What the script may do is bounded as for a query.

    Raises:
        sqlite3.Error: SQLite refuses a statement.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        if hasattr(database, "setlimit"):  # since Python 3.11; before, only the steps are bounded
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LENGTH)
            database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        database.execute("PRAGMA temp_store = MEMORY")
        database.set_authorizer(_allow_making)
        with _bounded(database):
            for statement in _statements(script):
                if not MAKES.match(_without_comments(statement)):
                    raise sqlite3.OperationalError(
                        f"only CREATE TABLE, VIEW and INDEX and INSERT INTO may stand there, not {statement[:60]!r}"
                    )
                database.execute(statement)
        yield database


def _without_comments(statement: str) -> str:
    return re.sub(r"^(?:\s+|--[^\n]*\n|/\*.*?\*/)+", "", statement, flags=re.DOTALL)


def _allow_making(action: int, *details: str | None) -> int:
    if action in NEVER or (action == sqlite3.SQLITE_FUNCTION and details[1] in NO_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _allow_reading(action: int, *details: str | None) -> int:
    if action not in READING or (action == sqlite3.SQLITE_FUNCTION and details[1] in NO_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


@contextlib.contextmanager
def _bounded(database: sqlite3.Connection) -> Iterator[None]:
    """A context in which SQLite stops after `STEPS` steps."""
    left = iter(range(STEPS // CHECKED))
    database.set_progress_handler(lambda: next(left, None) is None, CHECKED)
    try:
        yield
    finally:
        database.set_progress_handler(None, 0)


@functools.lru_cache(maxsize=256)
def _results(script: str, query: str, reference: str) -> tuple[Result | None, ...]:
    """What a query gives: on the rows of the script, or on each fill if the script has none. None where it can't run.

    Args:
        reference: the query that says what the tables are filled with.
    """
    try:
        with _database(script) as database:
            filled = _has_rows(database)
            return (_run(database, query),) if filled else tuple(_on_fills(script, query, reference))
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return (None,)


def _on_fills(script: str, query: str, reference: str) -> Iterable[Result | None]:
    for seed in range(FILLS):
        with _database(script) as database:
            _fill(database, reference, seed)
            yield _run(database, query)


def _run(database: sqlite3.Connection, query: str) -> Result | None:
    """The result of a query; None if it fails, is none, takes too long or gives too much."""
    if not QUERY.match(query):
        return None
    database.set_authorizer(_allow_reading)
    try:
        with _bounded(database), contextlib.closing(database.execute(query)) as cursor:
            rows = cursor.fetchmany(ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None
    return rows if len(rows) <= ROWS else None


def _tables(database: sqlite3.Connection) -> list[str]:
    found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return [name for (name,) in found]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _has_rows(database: sqlite3.Connection) -> bool:
    """Whether any table has a row."""
    return any(database.execute(f"SELECT 1 FROM {_quoted(name)} LIMIT 1").fetchone() for name in _tables(database))


def _fill(database: sqlite3.Connection, reference: str, seed: int) -> None:
    """Give each table some rows. Their values are small numbers, letters, and what the reference speaks of."""
    numbers: list[Any] = [0, 1, 2, 3, 5, 8]
    texts: list[Any] = ["a", "b", "c", "d"]
    for single, double, number in LITERAL.findall(reference):
        if number:
            value = float(number) if "." in number else int(number)
            numbers += [value, value - 1, value + 1]
        else:
            texts.append((single or double).replace("''", "'").strip("%"))
    draw = random.Random(seed)
    database.set_authorizer(lambda *_: sqlite3.SQLITE_OK)  # nothing of the model's or the chat's runs here
    for table in _tables(database):
        columns = database.execute("SELECT name, type FROM pragma_table_info(?)", (table,)).fetchall()
        marks = ", ".join("?" * len(columns))
        for _ in range(FILLED):
            row = [draw.choice(_pool(kind, numbers, texts)) for _, kind in columns]
            database.execute(f"INSERT OR IGNORE INTO {_quoted(table)} VALUES ({marks})", row)


def _pool(kind: str, numbers: list[Any], texts: list[Any]) -> list[Any]:
    """The values for a column of a declared type. Numbers stand in columns of text too, as many schemas have it."""
    is_text = any(word in kind.upper() for word in ("CHAR", "TEXT", "CLOB", "DATE", "TIME"))
    return [*texts, *map(str, numbers)] if is_text else numbers if kind else [*numbers, *texts]


def _is_ordered(query: str) -> bool:
    """Whether the query orders its result: ORDER BY stands outside of brackets."""
    text, inner = query, None
    while text != inner:
        inner, text = text, re.sub(r"\([^()]*\)", "", text)
    return bool(re.search(r"\bORDER\s+BY\b", text, re.IGNORECASE))


def _agree(wanted: Result | None, found: Result | None, ordered: bool) -> bool:
    if wanted is None or found is None:
        return False
    left, right = ([tuple(map(_plain, row)) for row in rows] for rows in (wanted, found))
    return left == right if ordered else Counter(left) == Counter(right)


def _plain(value: Any) -> Any:
    """A value as it is compared: numbers to six digits, since sums may differ in the last ones."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
