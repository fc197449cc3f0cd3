"""A cleaned set has repaired rows, lacks the rows that can't be repaired, and no longer spoils a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.check.check_helpers import check
from helpers import chat, write_jsonl
from phinetune.data.check.findings import KINDS
from phinetune.data.check.fix import Fixed, write_fixed
from phinetune.errors import DataError

SOUND = chat("How far is it?", "Five miles.")
GARBLED = "Größe und Äpfel".encode().decode("cp1252")


def spoiled(folder: Path) -> Path:
    rows = [
        SOUND,
        {"prompt": "Was?", "completion": GARBLED, "tag": {"from": [GARBLED, 3, None]}},
        chat("bell\x07", "Yes."),
        chat("how far is  it?", "five miles."),
        chat("What?", ""),
        chat("What key?", "AKIA" + "Q3RZ7PLM5TXK2WVB"),
        chat("Held out?", "Yes."),
        {"nothing": 1},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines += [b"{", json.dumps(chat("Größe?", "Groß."), ensure_ascii=False).encode("cp1252")]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    return folder / "a.jsonl"


def fixed(folder: Path) -> tuple[Fixed, list[dict[str, Any]]]:
    held = write_jsonl(folder / "h.jsonl", [chat("Held out?", "Yes.")])
    out = folder / "clean.jsonl"
    made = write_fixed(check(spoiled(folder), held_out=held), out)
    return made, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_rows_are_repaired_or_left_out_and_counted(tmp_path: Path) -> None:
    made, rows = fixed(tmp_path)
    assert rows == [
        SOUND,
        {"prompt": "Was?", "completion": "Größe und Äpfel", "tag": {"from": ["Größe und Äpfel", 3, None]}},
        chat("bell", "Yes."),
        chat("Größe?", "Groß."),
    ]
    assert made.rows == 4
    assert made.mended == {KINDS[kind].title: 1 for kind in ("mojibake", "control", "encoding")}
    assert made.left_out == {
        KINDS[kind].title: 1 for kind in ("duplicate", "empty_answer", "secret", "shared", "form", "broken")
    }
    assert made.remaining == []
    assert made.line().startswith(f"Wrote {tmp_path / 'clean.jsonl'}: 4 rows; repaired 1 with ")


def test_a_cleaned_set_spoils_no_run(tmp_path: Path) -> None:
    fixed(tmp_path)
    report = check(tmp_path / "clean.jsonl", held_out=tmp_path / "h.jsonl")
    assert not report.spoiled
    assert report.counts.kept == report.counts.rows == 4


def test_a_sound_set_stays_as_it_is(tmp_path: Path) -> None:
    rows = [
        SOUND,
        {"text": "Once.<|end|>"},
        {"input_ids": [5, 263], "labels": [-100, 263]},
        chat("é", "ü", system="🙂"),
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    write_fixed(check(file), tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text() == file.read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("a.jsonl", "stands there already", id="the checked file"),
        pytest.param("folder.jsonl", "stands there already", id="a folder"),
        pytest.param("b.csv", r"ends in \.jsonl", id="another kind of file"),
    ],
)
def test_nothing_is_overwritten_and_only_json_lines_are_written(tmp_path: Path, name: str, words: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [SOUND])
    (tmp_path / "folder.jsonl").mkdir()
    before = file.read_bytes()
    with pytest.raises(DataError, match=words):
        write_fixed(check(file), tmp_path / name)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "folder.jsonl"]


def test_an_empty_set_is_not_written(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"nothing": 1}])
    with pytest.raises(DataError, match="no row would be left"):
        write_fixed(check(file), tmp_path / "b.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_what_a_run_does_not_use_stays(tmp_path: Path) -> None:
    row = {**SOUND, "topic": "sea", "id": 3, "system": "Be kind."}
    row["messages"] = [{**message, "name": "Ann"} for message in row["messages"]]
    write_fixed(check(write_jsonl(tmp_path / "a.jsonl", [row])), tmp_path / "b.jsonl")
    assert json.loads((tmp_path / "b.jsonl").read_text()) == row
