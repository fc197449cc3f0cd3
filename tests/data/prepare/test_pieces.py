"""Long texts in pieces: the same set in memory, as Arrow files and streamed, with rows counted as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import chat, write_jsonl
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare import arrow_table as table
from phinetune.data.prepare import build_sets as build
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.pieces import cut_into_pieces
from phinetune.data.read import source_parts
from phinetune.engine.examples import Encoded

TOKENIZER = byte_tokenizer(300)
ENCODER = make_encoder(TOKENIZER)


def a_row(i: int) -> dict[str, Any]:
    """Texts of one to five pieces, chats between them; some rows with a column that is not used."""
    row: dict[str, Any] = chat(f"What is {i}?", "This.") if i % 3 == 1 else {"text": f"<{i}> " * (1 + i % 11 * 4)}
    return {**row, "kind": i % 2, **({"title": "x", "n": i} if i % 5 else {})}


ROWS = [a_row(i) for i in range(40)]


def built(file: Path, **section: Any) -> ChatSet:
    return build_chats(RowEncoder(DataSection(train=str(file), tag="kind", **section), ENCODER, 60)).train


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sets of more than ten rows go through Arrow files."""
    monkeypatch.setattr(build, "SMALL", 10)
    monkeypatch.setattr(source_parts, "PIECE", 4)
    monkeypatch.setattr(table, "cores", lambda: 1)
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("ids", "length", "overlap", "wanted"),
    [
        ([1, 2, 3, 4, 5], 3, 1, [([1, 2, 3], [1, 2, 3]), ([3, 4, 5], [-100, 4, 5])]),
        ([1, 2, 3, 4], 3, 1, [([1, 2, 3], [1, 2, 3]), ([3, 4], [-100, 4])]),
        ([1, 2, 3, 4], 3, 2, [([1, 2, 3], [1, 2, 3]), ([2, 3, 4], [-100, -100, 4])]),
        ([1, 2, 3], 3, 2, [([1, 2, 3], [1, 2, 3])]),
    ],
)
def test_a_piece_begins_with_the_end_of_the_one_before(
    ids: list[int], length: int, overlap: int, wanted: list[tuple[list[int], list[int]]]
) -> None:
    assert cut_into_pieces(Encoded(ids, list(ids)), length, overlap) == [Encoded(*one) for one in wanted]


@pytest.mark.parametrize("section", [{}, {"overlap": 20}, {"limit": 17}, {"eval": 0.3}], ids=str)
def test_the_set_is_the_same_on_disk(request: pytest.FixtureRequest, tmp_path: Path, section: dict[str, Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    small = built(file, **section)
    request.getfixturevalue("large")
    stored = built(file, **section)
    assert list(stored.encoded) == list(small.encoded)
    assert stored.report == small.report
    assert list(stored.tags) == list(small.tags)
    assert (list(stored.chats), list(stored.places)) == (list(small.chats), list(small.places))
    assert small.report.kept == small.report.rows < len(small.encoded)
    assert small.report.pieces - small.report.in_pieces == len(small.encoded) - small.report.rows


def test_a_row_with_a_weight_is_taken_with_all_its_pieces(tmp_path: Path, large: None) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    once = list(built(file).encoded)
    section = DataSection(train=[{"path": str(file), "weight": 2}], tag="kind")  # type: ignore[list-item]
    twice = build_chats(RowEncoder(section, ENCODER, 60)).train
    assert sorted(twice.encoded) == sorted(2 * once)
    assert twice.report.rows == 80
    assert dict(twice.report.unused) == {"title": 64}
    assert dict(twice.report.unused_values) == {"n": 64}
    assert "  columns not used: title (64), n (64)" in twice.report.lines()


def test_a_stream_has_all_pieces(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    rows = [(row["input_ids"], row["labels"]) for row in built(file, streaming=True).dataset()]
    assert sorted(rows) == sorted((one.input_ids, one.labels) for one in built(file).encoded)


def test_what_storage_may_have_changed_is_counted_the_same(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rows = [chat("a", f"b{i}") for i in range(20)]
    for i, row in enumerate(rows):
        arguments = [{"x": None}, {"x": 2.0}, {"x": 1}][i % 3]
        row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}}]
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "{{ '<|end|>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
    )
    section = DataSection(train=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    encode = RowEncoder(section, make_encoder(tokenizer), None)
    small = build_chats(encode).train.report
    request.getfixturevalue("large")
    assert build_chats(encode).train.report == small
    assert dict(small.notes) == {"nulls": 7, "floats": 7}
    assert [line.rpartition(": ")[2] for line in small.lines()[1:]] == ["7 rows", "7 rows"]
