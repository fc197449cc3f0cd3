"""SQL is judged by what it gives, and a model's SQL can do nothing but read."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from phinetune.config.evaluation import EvaluationSection
from phinetune.errors import ConfigError
from phinetune.evaluation.metrics import open_metrics
from phinetune.evaluation.sql_answers import SqlResult, query_in

SCHEMA = "CREATE TABLE head (age INTEGER, name VARCHAR(20)); CREATE TABLE pay (name TEXT, amount REAL)"
ASKED = [
    {"role": "system", "content": f"Tables:\n{SCHEMA}"},
    {"role": "user", "content": "How many heads are older than 56?"},
]
COUNT = "SELECT count(*) FROM head WHERE age > 56"


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (COUNT, COUNT, 100),
        ("select COUNT(1) from head as h where not h.age <= 56;", COUNT, 100),
        ("Here it is:\n```sql\nSELECT count(*) FROM head WHERE 56 < age;\n```\nHappy to help!", COUNT, 100),
        ("SELECT count(*) FROM head WHERE age >= 56", COUNT, 0),
        ("SELECT count(*) FROM head WHERE age > 65", COUNT, 0),
        ("SELECT count(*) FROM heads WHERE age > 56", COUNT, 0),
        ("There are three.", COUNT, 0),
        ("", COUNT, 0),
        ("SELECT name FROM head WHERE name = 'Zoe'", "SELECT name FROM head WHERE name = 'Ann'", 0),
        ("SELECT age FROM head ORDER BY age DESC", "SELECT age FROM head ORDER BY age", 0),
        ("SELECT age FROM head ORDER BY age", "SELECT age FROM head", 100),
        ("SELECT sum(amount) FROM pay JOIN head ON head.name = pay.name", "SELECT sum(amount) FROM pay", 0),
        ("WITH old AS (SELECT * FROM head WHERE age > 56) SELECT count(*) FROM old", COUNT, 100),
        (COUNT, "SELECT missing FROM nowhere", None),
        (COUNT, "No query.", None),
    ],
)
def test_what_a_query_gives_decides(answer: str, reference: str, right: float | None) -> None:
    """The tables are those of the prompt; they are empty, so they are filled."""
    assert SqlResult("runs", "prompt")(answer, reference, ASKED) == right


def test_rows_that_the_prompt_brings_are_kept() -> None:
    shown = "CREATE TABLE t (n INT)\nINSERT INTO t VALUES (7), (8)\n\nWhat is the largest n?"
    asked = [{"role": "user", "content": shown}]
    assert SqlResult("runs", "prompt")("SELECT 8", "SELECT max(n) FROM t", asked) == 100


def test_a_file_gives_the_tables(tmp_path: Path) -> None:
    file = tmp_path / "schema.sql"
    file.write_text("-- two rows\nCREATE TABLE t (n INT);\nINSERT INTO t VALUES (1), (2);\nCREATE INDEX i ON t (n);\n")
    (metric,) = open_metrics(EvaluationSection(metrics=[{"name": "runs", "sql": str(file)}])).values()
    assert metric("SELECT 3", "SELECT sum(n) FROM t", []) == 100


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (None, "can't be read"),
        ("CREATE TABLE t (n INT;", "SQLite refuses it"),
        ("ATTACH 'evil.db' AS evil;", "only CREATE TABLE, VIEW and INDEX and INSERT INTO may stand there"),
        ("CREATE TABLE t AS SELECT load_extension('x');", "SQLite refuses it"),
        ("CREATE TABLE t(n); PRAGMA writable_schema = 1;", "may stand there, not 'PRAGMA"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(script: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.sql"
    if script is not None:
        file.write_text(script)
    with pytest.raises(ConfigError, match=told):
        open_metrics(EvaluationSection(metrics=[{"name": "runs", "sql": str(file)}]))


EVIL = [
    "ATTACH DATABASE '{out}' AS evil",
    "VACUUM INTO '{out}'",
    "WITH x AS (SELECT 1) INSERT INTO head SELECT 1, 'a' FROM x",
    "SELECT load_extension('{out}')",
    "SELECT writefile('{out}', 'x')",
    "SELECT 1; DROP TABLE head",
    "SELECT zeroblob(1000000000)",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    "WITH RECURSIVE t(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM t) SELECT x FROM t LIMIT 60",
    "SELECT a.age FROM head a, head b, head c, head d, head e, head f, head g, head h",
    "SELECT * FROM pragma_database_list",
    "PRAGMA database_list",
    "WITH x AS (SELECT 1) DELETE FROM head",
]


@pytest.mark.parametrize("answer", EVIL)
def test_a_models_sql_can_only_read_and_has_an_end(answer: str, tmp_path: Path) -> None:
    """Each of them is wrong, quickly, and leaves nothing behind; the tables of the next answer are whole."""
    out = tmp_path / "evil.db"
    metric = SqlResult("runs", "prompt")
    expected = 100 if answer.startswith("SELECT 1; DROP") else 0  # only its first statement runs
    reference = "SELECT 1" if expected else COUNT
    assert metric(answer.format(out=out), reference, ASKED) == expected
    assert not list(tmp_path.iterdir())
    assert metric(COUNT, COUNT, ASKED) == 100


def test_evil_in_the_prompts_tables_runs_no_more_than_in_an_answer(tmp_path: Path) -> None:
    out = tmp_path / "evil.db"
    asked = [{"role": "user", "content": f"CREATE TABLE t AS SELECT writefile('{out}', 'x');\n\nHow many?"}]
    assert SqlResult("runs", "prompt")("SELECT 1", "SELECT 1", asked) is None
    endless = "CREATE TABLE t AS WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT n FROM t;"
    assert SqlResult("runs", "prompt")("SELECT 1", "SELECT 1", [{"role": "user", "content": endless}]) is None
    assert not list(tmp_path.iterdir())


def test_every_action_but_reading_is_refused_by_the_authorizer() -> None:
    """What SQLite can ask for at all, by its own names."""
    from phinetune.evaluation.sql_answers import _allow_reading

    allowed = {"SQLITE_SELECT", "SQLITE_READ", "SQLITE_FUNCTION", "SQLITE_RECURSIVE"}
    actions = [name for name in dir(sqlite3) if name.startswith("SQLITE_") and f"{name}_" not in dir(sqlite3)]
    codes = ("CREATE_", "DROP_", "ATTACH", "DETACH", "PRAGMA", "INSERT", "UPDATE", "DELETE", "ALTER", "TRANSACTION")
    for name in actions:
        if name in allowed or any(name.startswith(f"SQLITE_{code}") for code in codes):
            answer = _allow_reading(getattr(sqlite3, name), None, "count", "main", None)
            assert (answer == sqlite3.SQLITE_OK) == (name in allowed), name


def test_a_query_ends_with_its_semicolon() -> None:
    assert query_in("Sure: SELECT ';' FROM t; That is all.") == "SELECT ';' FROM t;"
