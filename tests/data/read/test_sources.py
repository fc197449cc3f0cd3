"""Kinds of files beside JSON and CSV: packed ones, tables, texts, patterns of names."""

from __future__ import annotations

import datetime
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pytest

from phinetune.data.prepare.named_sources import name_sources, weighted
from phinetune.data.read.any_source import check_source, scan_rows
from phinetune.data.read.row import Broken, Row
from phinetune.data.read.source_parts import open_source
from phinetune.errors import DataError


def read(source: Path, **options: Any) -> list[Row | Broken]:
    return list(scan_rows(str(source), **options))


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


LINES = b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(5))


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zst)])
def test_packed_text_is_read_as_it_is_unpacked(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    files = {
        "a.jsonl": LINES,
        "a.json": b'[{"n": 1}]',
        "a.csv": b"n\n1\n",
        "a.tsv": b"n\tm\n1\t2\n",
        "a.txt": b"One.\n\nTwo.",
    }
    for name, data in files.items():
        file = tmp_path / f"{name}.{ending}"
        file.write_bytes(pack(data) + (pack(data) if name == "a.jsonl" else b""))  # several members in one file
        found = read(file)
        (tmp_path / name).write_bytes(data * (2 if name == "a.jsonl" else 1))
        plain = read(tmp_path / name)
        assert [row.fields for row in found] == [row.fields for row in plain]  # type: ignore[union-attr]
        assert found[-1].where == plain[-1].where.replace(name, file.name)
        opened = open_source(str(file), "train", tmp_path)
        assert [row for piece in opened.pieces(None) for row in opened.read(piece)] == found
    (tmp_path / f"cut.jsonl.{ending}").write_bytes(pack(LINES * 100)[:-20])
    assert isinstance(read(tmp_path / f"cut.jsonl.{ending}")[-1], Broken)
    (tmp_path / f"plain.jsonl.{ending}").write_bytes(LINES)
    (broken,) = read(tmp_path / f"plain.jsonl.{ending}")
    assert isinstance(broken, Broken)


def test_a_sheet_is_read_below_its_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = openpyxl.Workbook()
    first = book.active
    assert first is not None
    first.title = "Chats"
    for line in (
        [],
        ["q", "a", "day", None],
        ["Hi", 3, datetime.datetime(2024, 5, 1), None],
        [],
        ["Ho", None, None, "lost"],
    ):
        first.append(line)
    book.create_sheet("Other").append(["x"])
    file = tmp_path / "a.xlsx"
    book.save(file)
    with caplog.at_level(logging.WARNING, logger="phinetune"):
        row, broken = read(file)
    assert row == Row(f"{file}: row 3", {"q": "Hi", "a": 3, "day": "2024-05-01"})
    assert broken == Broken(f"{file}: row 5", "cell 4 stands in a column without a heading")
    assert "the sheet `Chats` is read; not read: Other" in caplog.text
    assert read(file, name="Other") == []
    (broken,) = read(file, name="None")
    assert "there is no sheet `None`; there are Chats, Other" in broken.problem  # type: ignore[union-attr]


TEXT = "First\nline.\n\n\nSecond.\n\n```\ncode\n\nmore\n```\nafter\n\n# Head\n\n## Sub\n\nUnder it.\n"


def test_a_text_is_read_by_paragraphs_or_cut_by_tokens(tmp_path: Path) -> None:
    plain, marked = tmp_path / "a.txt", tmp_path / "a.md"
    plain.write_text(TEXT)
    marked.write_text(TEXT)
    assert [row.fields["text"] for row in read(plain)][:3] == ["First\nline.", "Second.", "```\ncode"]  # type: ignore[union-attr]
    found = read(marked)
    assert [row.fields["text"] for row in found] == [  # type: ignore[union-attr]
        "First\nline.",
        "Second.",
        "```\ncode\n\nmore\n```\nafter",
        "# Head\n\n## Sub\n\nUnder it.",
    ]
    assert found[-1].where == f"{marked}:14"
    (whole,) = read(plain, text_by="tokens")
    assert whole == Row(
        f"{plain}:1",
        {"text": "First\nline.\n\nSecond.\n\n```\ncode\n\nmore\n```\nafter\n\n# Head\n\n## Sub\n\nUnder it."},
    )
    plain.write_text("\n\n".join("word " * 9_000 for _ in range(5)))
    assert len(read(plain, text_by="tokens")) == 3
    plain.write_bytes(b"Caf\xe9\n")
    (broken,) = read(plain)
    assert broken == Broken(f"{plain}:1", "not UTF-8 text (byte 0xe9 at column 4); save it as UTF-8", "encoding")


def test_a_pattern_stands_for_the_files_whose_names_it_fits(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    pattern = str(tmp_path / "*.jsonl")
    assert weighted(pattern) == [(str(tmp_path / "a.jsonl"), 1.0), (str(tmp_path / "b.jsonl"), 1.0)]
    assert len(weighted(str(tmp_path / "**" / "*.jsonl"))) == 3
    assert name_sources(pattern) == pattern
    none = str(tmp_path / "*.csv")
    assert check_source(none) == f"{none}: no file has such a name"
    with pytest.raises(DataError, match="no file has such a name"):
        read(Path(none))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "q\ta\nx, y\tz\n", "tabs"),
        ("b.csv", "q;a\nx, y;z\n", "semicolons"),
        ("b2.csv", '"q";"a"\r\n"x, y";z\r\n', "semicolons"),
        ("c.tsv", 'q,a\n"x, y",z\n', "commas"),
        ("d.csv", "q|a\nx, y|z\n", "bars"),
        ("e.csv", "sep=;\nq;a\nx, y;z\n", "semicolons"),
        ("f.csv", 'sep=,\r\nq,a\r\n"x, y",z\r\n', ""),
        ("g.csv", "sep=^\nq^a\nx, y^z\n", "`^`"),
    ],
)
def test_columns_may_be_set_apart_by_another_sign_and_a_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str, words: str
) -> None:
    """Excel writes semicolons into a .csv in many countries."""
    (tmp_path / name).write_text(text, newline="")
    line = 3 if text.startswith("sep=") else 2
    assert read(tmp_path / name) == [Row(f"{tmp_path / name}:{line}", {"q": "x, y", "a": "z"})]
    told = [f"{tmp_path / name}: its columns are set apart by {words}"] if words else []
    assert caplog.messages == told


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("How do I return boots?,Within 30 days.", "How do I return boots?"),
        ("怎么退货？,三十天内。", "怎么退货？"),
        (f"{'boots ' * 20},fine", f"{'boots ' * 10}…"),
        ("prompt,completion", None),
        ("Question?,First answer", None),
    ],
)
def test_a_first_line_that_looks_like_a_row_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, told: str | None
) -> None:
    """A table without a line of names would lose its first row in silence."""
    (tmp_path / "a.csv").write_text(f"{first}\nx,y\n", encoding="utf-8")
    assert len(read(tmp_path / "a.csv")) == 1
    assert [f"`{told}` looks like a row's words" in message for message in caplog.messages] == [True] * bool(told)


def test_another_sign_in_a_column_s_name_is_only_a_sign(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_text('"one; two",b\nx;y,z\n')
    assert read(tmp_path / "a.csv") == [Row(f"{tmp_path / 'a.csv'}:2", {"one; two": "x;y", "b": "z"})]
    (tmp_path / "b.csv").write_text('"one; two"\nx;y\n')
    assert read(tmp_path / "b.csv") == [Row(f"{tmp_path / 'b.csv'}:2", {"one; two": "x;y"})]
    assert not caplog.messages
