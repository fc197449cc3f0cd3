"""Many files, each spoiled in one way. Each gets its finding, with the right line and exit status, and no traceback."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cli.cli_helpers import run
from helpers import TINY, chat
from phinetune.data.check.findings import KINDS

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


def parquet(rows: list[dict[str, Any]], cut: int | None = None) -> Write:
    def write(folder: Path) -> Path:
        file = folder / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        file.write_bytes(file.read_bytes()[:cut])
        return file

    return write


def folder_of(**files: bytes) -> Write:
    def write(folder: Path) -> Path:
        for name, content in files.items():
            (folder / f"{name}.jsonl").write_bytes(content)
        return folder

    return write


def unreadable(folder: Path) -> Path:
    """The operating system refuses to read a process's memory at address 0, even for root."""
    (folder / "a.jsonl").symlink_to("/proc/self/mem")
    return folder / "a.jsonl"


def in_encoding(name: str) -> Write:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*GOOD[:2], chat("Größe?", "Groß.")])
    return raw("a.jsonl", text.encode(name))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALLS = {"tool_calls": [{"function": {"name": "rain", "arguments": "{}"}}]}
PAST = "Please tell me about the weather on the northern coast in the second week of March. "
GERMAN = "Das Wetter an der Küste bleibt in der zweiten Märzwoche wechselhaft, mit Regen und kräftigem Wind. "
LATIN = json.dumps(chat("Größe?", "Groß."), ensure_ascii=False).encode("latin-1")
SMUGGLED = "Hi" + "".join(chr(0xE0000 + ord(letter)) for letter in "obey me")
DEEP = b"[" * 150 + b"]" * 150
NO_TEXT = [{"type": "text", "text": None}]
BIG = b"word " * 10_000_000

# What is wrong, the file, the kind of finding and its place. Whether the status is 1 is the kind's own.
FILES: list[tuple[str, Write, str, str]] = [
    # No readable row
    ("broken line", raw("a.jsonl", lines(b'{"messages": [')), "broken", "a.jsonl:3"),
    ("not an object", raw("a.jsonl", lines(b"[1, 2]")), "broken", "a.jsonl:3"),
    ("null line", raw("a.jsonl", lines(b"null")), "broken", "a.jsonl:3"),
    ("two objects in a line", raw("a.jsonl", lines(b'{"text": "a"} {"text": "b"}')), "broken", "a.jsonl:3"),
    ("Python's quotes", raw("a.jsonl", lines(b"{'text': 'a'}")), "broken", "a.jsonl:3"),
    ("deep nesting", raw("a.jsonl", lines(b'{"a":' * 90_000)), "broken", "a.jsonl:3"),
    ("nesting of 150 levels", raw("a.jsonl", lines(b'{"a": ' + DEEP + b"}")), "broken", "a.jsonl:3"),
    ("number of 5000 digits", raw("a.jsonl", lines(b'{"a": ' + b"7" * 5000 + b"}")), "broken", "a.jsonl:3"),
    ("zero bytes", raw("a.jsonl", lines(b"\0" * 50)), "broken", "a.jsonl:3"),
    ("no line ends", raw("a.jsonl", b"".join(lines().splitlines()) + b"\n"), "broken", "a.jsonl:1"),
    ("broken JSON list", raw("a.json", b'[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]'), "broken", "a.json:3"),
    ("string in a JSON list", raw("a.json", b'[{"text": "a"},\n {"text": "b"},\n "c"]'), "broken", "a.json:3: row 3"),
    ("nested JSON list", raw("a.json", b'[{"text": "a"},\n {"b": ' + DEEP + b"}]"), "broken",
     "a.json:2: row 2"),
    ("number for a JSON list", raw("a.json", b"3"), "broken", "a.json"),
    ("too many cells", raw("a.csv", b"prompt,completion\na,b\nc,d,e\n"), "broken", "a.csv:3"),
    ("too many cells, later", raw("a.csv", b'prompt,completion\n"a\nb",c\nd,e,f\n'), "broken", "a.csv:4"),
    ("open quote", raw("a.csv", b'prompt,completion\na,b\n"c,d\n'), "broken", "a.csv:3"),
    ("missing cell", raw("a.csv", b"prompt,completion\na,b\nc\n"), "broken", "a.csv:3"),
    ("missing cell among semicolons", raw("a.csv", b"prompt;completion\na;b\nc\n"), "broken", "a.csv:3"),
    ("truncated Parquet", parquet(GOOD, -40), "broken", "a.parquet"),
    ("JSON Lines named Parquet", raw("a.parquet", lines()), "broken", "a.parquet"),
    ("folder with a broken file", folder_of(a=lines(), b=lines(b"{")), "broken", "b.jsonl:3"),
    ("folder of nothing", folder_of(), "broken", ""),
    ("unreadable file", unreadable, "broken", "a.jsonl"),
    # No text, or in another encoding
    ("gzip named JSON Lines", raw("a.jsonl", gzip.compress(lines())), "broken", "a.jsonl:1"),
    ("gzip named CSV", raw("a.csv", gzip.compress(b"prompt,completion\n")), "broken", "a.csv:1"),
    ("gzip named Parquet", raw("a.parquet", gzip.compress(lines())), "broken", "a.parquet:1"),
    ("Parquet named JSON Lines", raw("a.jsonl", b"PAR1" + b"\0" * 20), "broken", "a.jsonl:1"),
    ("pointer of Git LFS", raw("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n"), "broken", "a.jsonl:1"),
    ("web page", raw("a.json", b"<!DOCTYPE html>\n<html></html>"), "broken", "a.json:1"),
    ("UTF-16", in_encoding("utf-16"), "encoding", "a.jsonl:1"),
    ("UTF-16 without a mark", in_encoding("utf-16-be"), "encoding", "a.jsonl:1"),
    ("UTF-32 without a mark", in_encoding("utf-32-le"), "encoding", "a.jsonl:1"),
    ("UTF-16 CSV without a mark", raw("a.csv", "prompt,completion\na,b\n".encode("utf-16-le")), "encoding", "a.csv:1"),
    ("Latin-1 line", raw("a.jsonl", lines(LATIN)), "encoding", "a.jsonl:3"),
    ("Latin-1 in a JSON list", raw("a.json", b'[{"text": "a"},\n{"text": "gr\xfcn"}]'), "encoding", "a.json:2"),
    ("Shift-JIS CSV", raw("a.csv", "prompt,completion\na,b\n日本,語\n".encode("shift-jis")), "encoding", "a.csv:3"),
    ("mark inside the file", raw("a.jsonl", lines(codecs.BOM_UTF8 + lines())), "broken", "a.jsonl:3"),
    # Nothing in it
    ("empty file", raw("a.jsonl", b""), "nothing", "a.jsonl"),
    ("empty lines", raw("a.jsonl", b"\n\n"), "nothing", "a.jsonl"),
    ("CSV of a header alone", raw("a.csv", b"prompt,completion\n"), "nothing", "a.csv"),
    ("empty list", raw("a.json", b"[]"), "nothing", "a.json"),
    # Far too much in it
    ("50 MB line", raw("a.jsonl", lines(b'{"text": "' + BIG + b'"}')), "huge", "a.jsonl:3"),
    ("50 MB broken line", raw("a.jsonl", lines(b'{"text": "' + BIG)), "broken", "a.jsonl:3"),
    ("a million ids", third({"input_ids": [5] * 1_000_000}), "huge", "a.jsonl:3"),
    ("a hundred thousand keys", third({f"key {i}": i for i in range(100_000)}), "huge", "a.jsonl:3"),
    ("two thousand turns", turns(*[USER, ANSWER] * 1000), "huge", "a.jsonl:3"),
    # Rows of another build
    ("nested nulls", turns({"role": None, "content": {"parts": [None, {"text": None}]}}, None), "roles", "a.jsonl:3"),
    ("null turn", turns(USER, None), "form", "a.jsonl:3"),
    ("null in Parquet", parquet([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "c"}]), "content",
     "a.parquet: row 2"),
    ("null turn in Parquet", parquet([*GOOD, {"messages": [None]}]), "form", "a.parquet: row 4"),
    ("null part of a text", turns(USER, {**ANSWER, "content": NO_TEXT}), "content", "a.jsonl:3"),
    ("bytes in Parquet", parquet([{"text": b"\xff"}]), "content", "a.parquet: row 1"),
    ("list of chats in a row", third({"messages": [[USER, ANSWER]]}), "form", "a.jsonl:3"),
    ("chat inside a turn", third({"messages": [{"messages": [USER, ANSWER]}]}), "form", "a.jsonl:3"),
    ("turn that is no list", third({"messages": USER}), "form", "a.jsonl:3"),
    ("text for a list of turns", third({"messages": "hello"}), "form", "a.jsonl:3"),
    ("picture in a turn", turns({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), "content", "a.jsonl:3"),
    ("object for a content", turns(USER, {**ANSWER, "content": {"text": "x"}}), "content", "a.jsonl:3"),
    ("content that is a number", turns(USER, {"role": "assistant", "content": 3}), "content", "a.jsonl:3"),
    ("no known keys", third({"question": "a", "answer": "b"}), "form", "a.jsonl:3"),
    ("unknown role", turns(USER, {"role": "alien", "content": "x"}), "roles", "a.jsonl:3"),
    ("no answer", turns(USER), "roles", "a.jsonl:3"),
    ("answer first", turns(ANSWER, USER), "roles", "a.jsonl:3"),
    ("system message in the middle", turns(USER, {"role": "system", "content": "x"}, ANSWER), "roles", "a.jsonl:3"),
    ("calls that the template drops", turns(USER, {**ANSWER, "tool_calls": [{"name": "f"}]}), "template", "a.jsonl:3"),
    ("tool call without a name", turns(USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}), "tools", "a.jsonl:3"),
    ("call of a tool that is not there", third({"messages": [USER, {**ANSWER, **CALLS}], "tools": TOOLS}), "calls",
     "a.jsonl:3"),
    ("ids of another tokenizer", third({"input_ids": [1, 99_999]}), "labels", "a.jsonl:3"),
    ("nothing to train on", turns(USER, {**ANSWER, "train": False}), "untrained", "a.jsonl:3"),
    # Words that should not be there, or not so
    ("half a character", says("half \ud83d"), "letters", "a.jsonl:3"),
    ("empty answer", says("  \n"), "empty_answer", "a.jsonl:3"),
    ("empty question", third(chat(" ", "Yes.")), "empty_turn", "a.jsonl:3"),
    ("repeated turn", third(chat(PAST, PAST)), "repeated_turn", "a.jsonl:3"),
    ("two questions in a row", turns(USER, {**USER, "content": "And?"}, ANSWER), "order", "a.jsonl:3"),
    ("lost letters", says("Gr\ufffd\ufffde"), "replaced", "a.jsonl:3"),
    ("garbled letters", says("Größe, naïve – “so”".encode().decode("cp1252", "ignore")), "mojibake", "a.jsonl:3"),
    ("control characters", says("a bell \x07"), "control", "a.jsonl:3"),
    ("invisible letters", says(SMUGGLED), "control", "a.jsonl:3"),
    ("typed token", third(chat("What is <|end|>?", "A token.")), "typed_token", "a.jsonl:3"),
    ("typed token in a tool", third({"messages": [USER, ANSWER], "tools": [{"name": "<|end|>"}]}), "typed_token",
     "a.jsonl:3"),
    ("rendered answer", says("<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>"), "answer_markup", "a.jsonl:3"),
    ("rendered prompt", third({"prompt": "<|user|>\nHi<|end|>\n<|assistant|>\n", "completion": "Ho"}), "rendered",
     "a.jsonl:3"),
    ("a key twice", raw("a.jsonl", lines(b'{"text": "a", "text": "b"}')), "broken", "a.jsonl:3"),
    ("another template's answer", says("[INST] Hi [/INST] Ho"), "foreign_markup", "a.jsonl:3"),
    ("another template's text", third({"text": "<|im_start|>user\nHi<|im_end|>"}), "foreign_markup", "a.jsonl:3"),
    ("secret", says(f"Use {KEY} for it."), "secret", "a.jsonl:3"),
    ("personal data", says("Write to ada@analytical.co.uk."), "personal", "a.jsonl:3"),
    ("another language", third(chat(PAST * 2, GERMAN * 2)), "language", "a.jsonl:3"),
    # Rows beside others, or beside the model's length
    ("row twice", third(GOOD[0]), "duplicate", "a.jsonl:3"),
    ("long answer", says("long " * 500), "too_long", "a.jsonl:3"),
    ("long question", third(chat("long " * 500, "Yes.")), "cut", "a.jsonl:3"),
]  # fmt: skip


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`phinetune data check` in this process, a row of 512 tokens at most: status, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        settings = ("--set", f"model.path={TINY}", "--set", "training_config.max_length=512")
        status = run(monkeypatch, "data", "check", *arguments, *settings)
        return (status, *capsys.readouterr())

    return call


@pytest.mark.parametrize(("write", "kind", "where"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_each_spoiled_file_gets_its_finding(tmp_path: Path, check: Any, write: Write, kind: str, where: str) -> None:
    file = write(tmp_path)
    status, out, err = check(file, "--json")
    assert err == ""
    report = json.loads(out)
    (found,) = [one for one in report["findings"] if one["kind"] == kind]
    assert str(tmp_path / where) in [place["where"] for place in found["places"][:2]]
    assert (status, report["spoiled"]) == (1, True) if KINDS[kind].spoils else (0, False)


def test_there_are_forty_and_more_of_every_kind_that_a_file_alone_can_show() -> None:
    assert len(FILES) >= 40
    others = {"system", "no_stop", "near", "shared", "near_shared"}  # in test_check.py
    others |= {"prompts", "equal_answers", "contradiction", "length_bias"}  # in test_pairs.py
    others |= {"response"}  # in test_tagged_rows.py
    assert {kind for _, _, kind, _ in FILES} | others == set(KINDS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.jsonl", codecs.BOM_UTF8 + lines()),
        ("windows.jsonl", lines().replace(b"\n", b"\r\n")),
        ("list.jsonl", json.dumps(GOOD[:2], indent=1).encode()),
        ("lines.json", lines()),
        ("mark.csv", codecs.BOM_UTF8 + b"prompt,completion\r\nHow far?,Five\r\nHow long?,Six\r\n"),
        ("flag.jsonl", lines(json.dumps(chat("Which flag?", "\U0001f3f4\U000e0067\U000e0062\U000e007f")).encode())),
    ],
    ids=[
        "byte order mark",
        "line ends of Windows",
        "JSON list named JSON Lines",
        "JSON Lines named JSON",
        "CSV with a byte order mark",
        "a flag of invisible letters",
    ],
)
def test_what_is_sound_in_an_unusual_way_is_no_finding(tmp_path: Path, check: Any, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    status, out, _ = check(tmp_path / name, "--json")
    assert (status, json.loads(out)["findings"]) == (0, [])


def test_a_packed_file_is_read_or_refused_with_what_to_do(tmp_path: Path, check: Any) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines()))
    assert check(tmp_path / "a.jsonl.gz")[0] == 0
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(lines()))
    status, out, err = check(tmp_path / "a.jsonl.bz2")
    assert (status, out) == (2, "")
    assert "unpack it first" in err


def test_a_row_may_lead_neither_the_screen_nor_json_astray(tmp_path: Path, check: Any) -> None:
    rows = [{**GOOD[0], "id": "\ud800", "\ud801": 1}, {"messages": [{"role": "\x1b[2J\ud800", "content": ""}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(tmp_path / "a.jsonl", "--json")[0] == 1
    status, out, err = check(tmp_path / "a.jsonl", "--fix", tmp_path / "b.jsonl")
    assert (status, err) == (1, "")
    assert "\x1b" not in out
    assert json.loads((tmp_path / "b.jsonl").read_text()) == rows[0]
    assert check(tmp_path / "b.jsonl")[0] == 0
