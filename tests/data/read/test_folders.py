"""A folder of files reads like each of its files alone, by split as `datasets` divides it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from helpers import read_rows
from phinetune.data.read import source_parts
from phinetune.data.read.any_source import scan_rows
from phinetune.data.read.folders import is_folder_of_files
from phinetune.data.read.row import Row
from phinetune.data.read.source_parts import digest, open_source
from phinetune.errors import DataError


def write(folder: Path, name: str, *rows: Any) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        file.write_text("".join(f"{row}\n" for row in rows))
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def fields(source: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row.fields for row in read_rows(str(source), split)]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.csv", ["prompt,completion", "2024-01-01,7", "NA,null", "1e3,true", "007,"]),
        ("a.jsonl", [{"on": "2024-01-01", "n": 7}, {"on": "2024-01-02T00:00:00Z", "n": "x", "more": [1, "a"]}]),
        ("a.json", [{"on": "2024-01-01"}, {"n": 1.0}, {"n": {"a": None}}]),
        ("a.parquet", [{"on": "2024-01-01", "n": [1, 2]}]),
    ],
)
def test_a_folder_reads_like_its_file_alone(tmp_path: Path, name: str, rows: list[Any]) -> None:
    file = write(tmp_path / "folder", name, *rows)
    assert list(scan_rows(str(tmp_path / "folder"))) == list(scan_rows(str(file)))


@pytest.mark.parametrize(
    ("files", "split", "wanted"),
    [
        (["a.jsonl", "b.csv", "sub/c.parquet"], "train", ["a.jsonl", "b.csv", "sub/c.parquet"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["my-dev-set.jsonl", "my-training.jsonl"], "validation", ["my-dev-set.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/odd-00000-of-00001.jsonl"], "odd",
         ["data/odd-00000-of-00001.jsonl"]),
        (["train/a.jsonl", "valid/b.jsonl"], "train", ["train/a.jsonl"]),
        (["a.jsonl", ".hidden.jsonl", "__pycache__/b.json", "notes.txt"], "train", ["a.jsonl"]),
    ],
)  # fmt: skip
def test_files_belong_to_splits_as_with_datasets(
    tmp_path: Path, files: list[str], split: str, wanted: list[str]
) -> None:
    for name in files:
        row = {"file": name}
        write(tmp_path, name, *(["file", name] if name.endswith(".csv") else [row]))
    assert fields(tmp_path, split) == [{"file": name} for name in wanted]
    assert [row.where.partition(":")[0] for row in read_rows(str(tmp_path), split)] == [
        str(tmp_path / name) for name in wanted
    ]


def test_the_readme_of_a_folder_names_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.jsonl", {"n": 1})
    write(tmp_path, "b.jsonl", {"n": 2})
    listed = "".join(
        f"  - split: {split}\n    path: {file}\n" for split, file in (("train", "b.jsonl"), ("odd", "a.jsonl"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n")
    assert (fields(tmp_path), fields(tmp_path, "odd")) == ([{"n": 2}], [{"n": 1}])
    write(tmp_path, "c.jsonl", {"n": 3})
    assert (fields(tmp_path), caplog.text) == ([{"n": 2}], "")
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl"):
        fields(tmp_path)


def test_the_readme_of_a_folder_names_the_folder_of_each_configuration(tmp_path: Path) -> None:
    for name, n in (("easy", 1), ("hard", 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "train.jsonl", {"n": n})
    listed = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("easy", "hard"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    assert [row.fields for row in scan_rows(str(tmp_path), "train", "hard")] == [{"n": 2}]
    with pytest.raises(DataError, match="hard"):
        fields(tmp_path)


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("train[:2]", [0, 1]), ("train[50%:]", [2, 3]), ("test+train[-1:]", [9, 3]), ("train[1:3]", [1, 2])],
)
def test_parts_of_splits_are_read(tmp_path: Path, split: str, wanted: list[int]) -> None:
    write(tmp_path, "train.jsonl", *({"n": n} for n in range(4)))
    write(tmp_path, "test.jsonl", {"n": 9})
    assert fields(tmp_path, split) == [{"n": n} for n in wanted]
    source = open_source(str(tmp_path), split, tmp_path)
    assert [row.fields["n"] for piece in source.pieces(None) for row in source.read(piece)] == wanted  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("split", "words"),
    [("dev", "there is no split `dev`; there are train"), ("dev[:1]", "is no part of"), ("train[:x]", "is no part of")],
)
def test_a_split_that_is_not_there_is_refused(tmp_path: Path, split: str, words: str) -> None:
    write(tmp_path, "a.jsonl", {"n": 1})
    with pytest.raises(DataError, match=words):
        read_rows(str(tmp_path), split)


def test_data_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", {"n": 1})
    for name in ("b.jsonl.bz2", "c.feather", "d.arrow"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        str(tmp_path / name) for name in ("b.jsonl.bz2", "c.feather", "d.arrow")
    ]
    assert "unpack it first" in caught.value.problems[0]
    assert caught.value.problems[0].endswith("; or move it out of the folder")


def test_texts_are_rows_where_they_are_all_that_a_folder_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.md").write_text("# One\n\nFirst.\n\nSecond.\n")
    (tmp_path / "LICENSE.txt").write_text("Free.\n")
    (tmp_path / "README.md").write_text("About.\n")
    assert is_folder_of_files(tmp_path)
    assert fields(tmp_path) == [{"text": "# One\n\nFirst."}, {"text": "Second."}]
    write(tmp_path, "b.jsonl", {"n": 1})
    assert fields(tmp_path) == [{"n": 1}]
    assert caplog.text == ""


def test_a_file_of_no_split_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "train.jsonl", {"n": 1})
    write(tmp_path, "more.jsonl", {"n": 2})
    with caplog.at_level(logging.WARNING, logger="phinetune"):
        assert fields(tmp_path) == [{"n": 1}]
        digest(str(tmp_path), "train")
    assert caplog.text.count("more.jsonl") == 1


def test_other_folders_are_left_to_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"n": 1}]).save_to_disk(str(tmp_path / "saved"))
    assert not is_folder_of_files(tmp_path / "saved")
    assert fields(tmp_path / "saved") == [{"n": 1}]
    assert not is_folder_of_files(tmp_path / "missing")
    write(tmp_path / "hidden", ".a.jsonl", {"n": 1})
    assert not is_folder_of_files(tmp_path / "hidden")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a folder that `datasets` can load"):
        fields(tmp_path / "empty")


def test_pieces_of_a_folder_are_those_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_parts, "PIECE", 2)
    folder = tmp_path / "folder"
    write(folder, "a.jsonl", *({"n": n} for n in range(5)))
    write(folder, "b.csv", "n", *range(5))
    write(folder, "c.parquet", *({"n": n} for n in range(5)))
    source = open_source(str(folder), "train", tmp_path)
    rows = [row for piece in reversed(source.pieces(None)) for row in reversed(list(source.read(piece)))]
    assert rows[::-1] == list(scan_rows(str(folder)))
    some = [row for piece in source.pieces(4) for row in source.read(piece)]
    assert some[:4] == rows[::-1][:4]
    assert len(some) < 10


def test_the_digest_of_a_folder_is_that_of_its_splits_files(tmp_path: Path) -> None:
    file = write(tmp_path, "train.jsonl", {"n": 1})
    write(tmp_path, "test.jsonl", {"n": 2})
    before = {split: digest(str(tmp_path), split) for split in ("train", "test", "train[:1]")}
    assert len(set(before.values())) == 3
    write(tmp_path, "train.jsonl", {"n": 3})
    after = {split: digest(str(tmp_path), split) for split in before}
    assert [before[split] == after[split] for split in before] == [False, True, False]
    assert isinstance(next(scan_rows(str(file))), Row)
