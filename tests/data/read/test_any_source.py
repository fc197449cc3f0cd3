"""Sources: every kind of file gives the same rows; broken ones are named with their lines."""

from __future__ import annotations

import csv
import json
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from helpers import read_rows
from phinetune.data.read.any_source import scan_rows
from phinetune.data.read.row import Broken, Row
from phinetune.data.read.source_parts import open_source
from phinetune.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"instruction": "Übersetze, bitte", "input": 'tea\n"green"', "output": "Tee"},
    {"instruction": "Add", "input": "1, 2", "output": "3"},
]


def write(path: Path, kind: str) -> Path:
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    elif kind in ("json", "wrapped"):
        path.write_text(json.dumps({"data": ROWS} if kind == "wrapped" else ROWS, indent=1), encoding="utf-8-sig")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        data = datasets.Dataset.from_list(ROWS)
        data.to_parquet(str(path)) if kind == "parquet" else data.save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("jsonl", "a.jsonl"),
        ("jsonl", "a.json"),
        ("json", "a.json"),
        ("wrapped", "a.json"),
        ("csv", "a.csv"),
        ("parquet", "a.parquet"),
        ("folder", "saved"),
    ],
)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, name: str) -> None:
    source = write(tmp_path / name, kind)
    assert [fields for _, fields in read_rows(str(source))] == ROWS


def test_a_folder_of_splits_is_read_by_split(tmp_path: Path) -> None:
    halves = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(halves).save_to_disk(str(tmp_path / "both"))
    assert [fields for _, fields in read_rows(str(tmp_path / "both"), "test")] == ROWS[1:]
    with pytest.raises(DataError, match="no split `dev`; there are train, test"):
        read_rows(str(tmp_path / "both"), "dev")


def test_rows_know_their_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [where for where, _ in read_rows(str(file))] == [f"{file}:1", f"{file}:3"]
    table = tmp_path / "a.csv"
    table.write_text('prompt,completion\n"two\nlines",x\ny,z\n')
    assert [where for where, _ in read_rows(str(table))] == [f"{table}:2", f"{table}:4"]


def test_all_broken_lines_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": \n[1]\n')
    with pytest.raises(DataError) as caught:
        read_rows(str(file))
    assert [p.split(": ")[0] for p in caught.value.problems] == [f"{file}:2", f"{file}:3"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "a.json:2: broken JSON"),
        ("a.json", b"3", "expected a list of objects, found a number"),
        ("a.json", b'[{"a": 1}, "x"]', "row 2: expected an object, found a string"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: more cells"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv:3: fewer cells"),
        ("a.json", b'[{"a": 1},\n {"b": 1, "b": 1}]', 'a.json:2: row 2: the key "b" stands twice in one object'),
        ("a.json", b'[{"a": [{"b": 1, "b": 2}]}]', 'a.json:1: row 1: the key "b" stands twice'),
        ("a.json", b'{"data": [{"a": 1}], "data": [{"a": 2}]}', 'a.json: the key "data" stands twice'),
        ("a.jsonl", b'{"a": 1, "c": 1}\n{"a": {"b": 1, "b": 2}}', 'a.jsonl:2: broken JSON: the key "b" stands twice'),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: two columns are named `a`"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8"),
        ("a.docx", b"x", "unknown kind of file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(file)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('[\n {"a": 1},\n\n {"a": [1,\n 2]}, {"a": 3}]', [2, 4, 5]),
        ('{"n": 1,\n"data" : [{"a": 1},\n\n{"a": 2}, {"a": 3}]}', [2, 4, 4]),
    ],
    ids=["list", "list inside an object"],
)
def test_rows_of_a_json_list_know_their_line(tmp_path: Path, text: str, lines: list[int]) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    wanted = [f"{file}:{line}: row {number}" for number, line in enumerate(lines, 1)]
    assert [where for where, _ in read_rows(str(file))] == wanted


def test_a_scan_goes_on_behind_broken_places(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a"\n{"a": "caf\xe9"}\n[]\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    found = list(scan_rows(str(file)))
    assert [isinstance(row, Row) for row in found] == [True, False, False, False, False, True]
    assert found[0] == Row(f"{file}:1", {"a": 1})
    broken = [row for row in found if isinstance(row, Broken)]
    assert [row.where for row in broken] == [f"{file}:{line}" for line in (2, 3, 4, 5)]
    assert [row.kind for row in broken] == ["broken", "encoding", "broken", "broken"]
    assert broken[1].problem == "not UTF-8 text (byte 0xe9 at column 11); save it as UTF-8"
    assert broken[1].salvaged == {"a": "café"}
    assert "nested too deeply" in broken[3].problem


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_a_wide_encoding_is_named_and_can_be_salvaged(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "ü"}\n{"a": 2}\n', encoding=encoding)
    if encoding == "utf-16-be":
        file.write_bytes(b"\xfe\xff" + file.read_bytes())
    found = list(scan_rows(str(file)))
    assert [(row.where, row.salvaged) for row in found] == [  # type: ignore[union-attr]
        (f"{file}:1", {"a": "ü"}),
        (f"{file}:2", {"a": 2}),
    ]
    assert all(f"the file is {encoding.upper()[:6]}, not UTF-8" in row.problem for row in found)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(str(file))


def test_a_folder_with_broken_files_names_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": \n[1]\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(str(tmp_path)))
    assert [p.split(": ")[0] for p in caught.value.problems] == [f"{tmp_path}/b.jsonl:2", f"{tmp_path}/b.jsonl:3"]
    assert [row.where for row in scan_rows(str(tmp_path)) if isinstance(row, Row)] == [
        f"{tmp_path}/{place}" for place in ("a.jsonl:1", "a.jsonl:2", "b.jsonl:1")
    ]


def test_a_blank_cell_of_a_table_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,input,output\na,,b\nc,d,\n")
    assert [fields for _, fields in read_rows(str(tmp_path / "a.csv"))] == [
        {"instruction": "a", "input": None, "output": "b"},
        {"instruction": "c", "input": "d", "output": None},
    ]


def test_what_stands_beside_a_list_of_rows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.json"
    for more, said in (({}, False), ({"system": "Be kind.", "version": 1}, True)):
        file.write_text(json.dumps({"data": ROWS, **more}))
        assert [fields for _, fields in read_rows(str(file))] == ROWS
        assert ("a.json: not read beside `data`: system, version" in caplog.text) == said


def test_a_map_of_a_parquet_file_is_a_dictionary(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    for value, wanted in (([("x", 1), ("y", 2)], {"x": 1, "y": 2}), ([("x", 1), ("x", 2)], None)):
        pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([value], kind)}), file)
        source = open_source(str(file), "train", tmp_path)
        (item,) = (item for piece in source.pieces(None) for item in source.read(piece))
        if wanted:
            assert isinstance(item, Row)
            assert [fields for _, fields in read_rows(str(file))] == [item.fields] == [{"a": wanted}]
        else:
            assert isinstance(item, Broken)
            with pytest.raises(DataError, match="not a readable Parquet file"):
                read_rows(str(file))


def test_a_saved_set_of_arrays_gives_lists(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"input_ids": [1, 2]}]).with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    assert [fields for _, fields in read_rows(str(tmp_path / "saved"))] == [{"input_ids": [1, 2]}]


@pytest.mark.parametrize("source", ["missing.jsonl", "deep/missing.parquet", "no file at all"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(source)


def test_a_damaged_parquet_file_with_dates_can_be_copied_to_where_it_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    columns = {"on": [date(2024, 1, 1)] * 4000, "text": [f"row {i}" for i in range(4000)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2000, use_dictionary=False)
    place = pyarrow.parquet.read_metadata(file).row_group(1).column(1).data_page_offset
    content = bytearray(file.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    file.write_bytes(content)
    source = open_source(str(file), "train", tmp_path)
    items = [item for piece in source.pieces(None) for item in source.read(piece)]
    assert [type(item) for item in (items[0], items[-1])] == [Row, Broken]
