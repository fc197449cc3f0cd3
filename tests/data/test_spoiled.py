"""Forty files, each spoiled in one way: each gets its finding with the right line, and none a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from check_helpers import check, kinds, places
from helpers import chat, write_jsonl
from phinetune.data.check_screen import show_check

GOOD = [chat(f"How far is it from town {i} to the sea, please?", f"It is {i} miles.") for i in range(3)]
USER = {"role": "user", "content": "Well?"}
ANSWER = {"role": "assistant", "content": "Yes."}
KEY = "AKIA" + "Q3RZ7PLM5TXK2WVB"  # put together here, so that no scanner takes this file for a leak

Write = Callable[[Path], Path]


def third(row: Any) -> Write:
    """A file whose third line is `row`, between sound ones."""
    return lambda folder: raw("a.jsonl", lines(json.dumps(row).encode(), json.dumps(GOOD[2]).encode()))(folder)


def turns(*messages: Any) -> Write:
    return third({"messages": list(messages)})


def says(answer: str) -> Write:
    return third(chat("Say something, please.", answer))


def raw(name: str, content: bytes) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def lines(*more: bytes) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in GOOD[:2]) + b"".join(line + b"\n" for line in more)


def truncated_parquet(folder: Path) -> Path:
    import datasets

    file = folder / "a.parquet"
    datasets.Dataset.from_list(GOOD).to_parquet(str(file))
    file.write_bytes(file.read_bytes()[:-40])
    return file


def parquet_with_a_null(folder: Path) -> Path:
    import datasets

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "c"}]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def in_encoding(name: str) -> Write:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*GOOD[:2], chat("Größe?", "Groß.")])
    return raw("a.jsonl", text.encode(name))


def latin1_line(folder: Path) -> Path:
    return raw("a.jsonl", lines(json.dumps(chat("Größe?", "Groß."), ensure_ascii=False).encode("latin-1")))(folder)


def long_line(row: bytes) -> Write:
    return raw("a.jsonl", lines(row))


FILES: list[tuple[str, Write, str, str]] = [
    ("broken line", raw("a.jsonl", lines(b'{"messages": [')), "broken", "a.jsonl:3"),
    ("not an object", raw("a.jsonl", lines(b"[1, 2]")), "broken", "a.jsonl:3"),
    ("null line", raw("a.jsonl", lines(b"null")), "broken", "a.jsonl:3"),
    ("two objects in a line", raw("a.jsonl", lines(b'{"text": "a"} {"text": "b"}')), "broken", "a.jsonl:3"),
    ("deep nesting", raw("a.jsonl", lines(b'{"a":' * 90_000)), "broken", "a.jsonl:3"),
    ("number of 5000 digits", raw("a.jsonl", lines(b'{"a": ' + b"7" * 5000 + b"}")), "broken", "a.jsonl:3"),
    ("zero bytes", raw("a.jsonl", lines(b"\0" * 50)), "broken", "a.jsonl:3"),
    ("broken JSON list", raw("a.json", b'[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]'), "broken", "a.json:3"),
    ("string in a JSON list", raw("a.json", b'[{"text": "a"},\n {"text": "b"},\n "c"]'), "broken", "a.json:3: row 3"),
    ("too many cells", raw("a.csv", b"prompt,completion\na,b\nc,d,e\n"), "broken", "a.csv:3"),
    ("open quote", raw("a.csv", b'prompt,completion\na,b\n"c,d\n'), "broken", "a.csv:3"),
    ("missing cell", raw("a.csv", b"prompt,completion\na,b\nc\n"), "form", "a.csv:3"),
    ("truncated Parquet", truncated_parquet, "broken", "a.parquet"),
    ("Parquet with a null", parquet_with_a_null, "content", "a.parquet: row 2"),
    ("gzip named JSON Lines", raw("a.jsonl", b"\x1f\x8b\x08\0\0\0\0\0"), "encoding", "a.jsonl:1"),
    ("UTF-16", in_encoding("utf-16"), "encoding", "a.jsonl:1"),
    ("Latin-1 line", latin1_line, "encoding", "a.jsonl:3"),
    ("Shift-JIS CSV", raw("a.csv", "prompt,completion\na,b\n日本,語\n".encode("shift-jis")), "encoding", "a.csv:3"),
    ("empty file", raw("a.jsonl", b"\n\n"), "nothing", "a.jsonl"),
    ("50 MB line", long_line(b'{"text": "' + b"word " * 10_000_000 + b'"}'), "huge", "a.jsonl:3"),
    ("50 MB broken line", long_line(b'{"text": "' + b"word " * 10_000_000), "broken", "a.jsonl:3"),
    ("nested nulls", turns({"role": None, "content": {"parts": [None, {"text": None}]}}, None), "roles", "a.jsonl:3"),
    ("null turn", turns(USER, None), "form", "a.jsonl:3"),
    ("no known keys", third({"question": "a", "answer": "b"}), "form", "a.jsonl:3"),
    ("unknown role", turns(USER, {"role": "alien", "content": "x"}), "roles", "a.jsonl:3"),
    ("no answer", turns(USER), "roles", "a.jsonl:3"),
    ("answer first", turns(ANSWER, USER), "roles", "a.jsonl:3"),
    ("system message in the middle", turns(USER, {"role": "system", "content": "x"}, ANSWER), "roles", "a.jsonl:3"),
    ("content that is a number", turns(USER, {"role": "assistant", "content": 3}), "content", "a.jsonl:3"),
    ("calls that the template drops", turns(USER, {**ANSWER, "tool_calls": [{"name": "f"}]}), "template", "a.jsonl:3"),
    ("tool call without a name", turns(USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}), "tools", "a.jsonl:3"),
    ("ids of another tokenizer", third({"input_ids": [1, 99_999]}), "labels", "a.jsonl:3"),
    ("nothing to train on", turns(USER, {**ANSWER, "train": False}), "untrained", "a.jsonl:3"),
    ("half a character", says("half \ud83d"), "letters", "a.jsonl:3"),
    ("empty answer", says("  \n"), "empty_answer", "a.jsonl:3"),
    ("lost letters", says("Gr\ufffd\ufffde"), "replaced", "a.jsonl:3"),
    ("garbled letters", says("Größe, naïve – “so”".encode().decode("cp1252", "ignore")), "mojibake", "a.jsonl:3"),
    ("rendered answer", says("<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>"), "answer_markup", "a.jsonl:3"),
    ("secret", says(f"Use {KEY} for it."), "secret", "a.jsonl:3"),
    ("JSON Lines without line ends", raw("a.jsonl", b"".join(lines().splitlines()) + b"\n"), "broken", "a.jsonl:1"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "kind", "where"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_each_spoiled_file_gets_its_finding(tmp_path: Path, console: Any, write: Write, kind: str, where: str) -> None:
    file = write(tmp_path)
    report = check(file, max_length=512)
    assert places(report, kind)[:1] == [where]
    assert report.spoiled
    assert json.dumps(report.to_dict())
    show_check(report, console)
    assert where in console.file.getvalue()


def test_there_are_forty_and_the_sound_rows_beside_them_stand_alone(tmp_path: Path) -> None:
    assert len(FILES) == 40
    report = check(write_jsonl(tmp_path / "a.jsonl", GOOD))
    assert (kinds(report), report.spoiled) == (set(), False)
