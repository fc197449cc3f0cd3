"""Held-out chats as a split of a data set, and the rows that are trained on under any of their names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from helpers import chat, write_jsonl
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare import build_sets
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import Chats
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.sources import check_sources, held_out_section, name_held_out
from phinetune.errors import ConfigError, DataError

ENCODER = make_encoder(byte_tokenizer(300))
SPLITS = {split: [chat(f"{split} {i}", f"answer {i}") for i in range(6)] for split in ("train", "validation", "extra")}


def build(**section: Any) -> Chats:
    return build_chats(RowEncoder(DataSection(**section), ENCODER, None))


def asked(made: Any) -> set[str]:
    return {chat[0]["content"].split()[0] for chat in made.chats}


@pytest.fixture(params=["files", "saved", "configurations"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    place = tmp_path / "set"
    if request.param == "saved":
        made = {name: datasets.Dataset.from_list(rows) for name, rows in SPLITS.items()}
        datasets.DatasetDict(made).save_to_disk(str(place))
        return place
    place.mkdir()
    for name, rows in SPLITS.items():
        write_jsonl(place / f"{name}.jsonl", rows)
    if request.param == "configurations":
        write_card(place, default={"train": "train.jsonl", "validation": "validation.jsonl"})
    return place


def write_card(folder: Path, **configs: dict[str, str]) -> None:
    lines = ["---", "configs:"]
    for name, files in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, file in files.items() for line in (f"  - split: {split}", f"    path: {file}")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_another_split_of_the_set_that_is_trained_on(folder: Path) -> None:
    made = build(train=str(folder), eval={"split": "validation"})
    assert (asked(made.train), asked(made.held_out)) == ({"train"}, {"validation"})
    assert made.held_out
    assert made.held_out.report.source == f"{folder} (validation)"
    assert made.held_out.report.rows == 6


def test_a_split_of_another_set(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat("one", "1")])
    made = build(train=str(file), eval={"path": str(folder), "split": "validation"}, limit=1)
    assert asked(made.held_out) == {"validation"}
    assert made.held_out
    assert made.held_out.report.rows == 6  # the limit is of the training rows
    assert asked(build(train=str(file), eval={"path": str(folder)}).held_out) == {"train"}


@pytest.mark.parametrize("large", [False, True])
def test_a_configuration_of_a_set(large: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    if large:
        monkeypatch.setattr(build_sets, "SMALL", 3)
    for name, rows in SPLITS.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    write_card(tmp_path, first={"train": "train.jsonl"}, second={"train": "extra.jsonl"})
    made = build(train=str(tmp_path), name="second", eval={"name": "first"})
    assert (asked(made.train), asked(made.held_out)) == ({"extra"}, {"train"})
    assert made.held_out
    assert made.held_out.report.source == f"{tmp_path} (first, train)"
    assert asked(build(train=str(tmp_path), name="first").train) == {"train"}
    with pytest.raises(DataError, match="first"):
        build(train=str(tmp_path), name="third")


def test_several_sources_give_one_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", [chat(f"{split}-{name}", "x")])
    train = [str(tmp_path / "a"), {"path": str(tmp_path / "b"), "weight": 3}]
    made = build(train=train, eval={"split": "test"})
    assert (len(made.train), asked(made.held_out)) == (4, {"test-a", "test-b"})


def refused(**section: Any) -> list[str]:
    with pytest.raises(ConfigError) as told:
        check_sources(DataSection(**section))
    return told.value.problems


def test_the_file_that_is_trained_on_is_no_held_out_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", SPLITS["train"])
    other = write_jsonl(tmp_path / "b.jsonl", SPLITS["extra"])
    link = tmp_path / "link.jsonl"
    os.symlink(file, link)
    monkeypatch.chdir(tmp_path)
    for spelling in ("a.jsonl", "./a.jsonl", str(file), str(link), f"{tmp_path}/../{tmp_path.name}/a.jsonl"):
        assert refused(train=str(file), eval=spelling) == [
            f"data.eval: {spelling} is the file that is trained on; write `eval: 0.1` to hold a tenth of it out, or "
            "name another file"
        ]
    assert len(refused(train=[str(other), {"path": str(file), "weight": 2}], eval=["a.jsonl", "./b.jsonl"])) == 2
    assert "a.jsonl is the file" in refused(train=str(file), eval={"path": "a.jsonl"})[0]
    check_sources(DataSection(train=str(file), eval=str(other)))


def test_the_split_that_is_trained_on_is_no_held_out_split(folder: Path) -> None:
    for given in (str(folder), [f"{folder}/"], {"path": str(folder)}, {"split": "train"}):
        (problem,) = refused(train=str(folder), eval=given)
        assert "the split `train` of" in problem
        assert "write `eval: {split: " in problem
        assert "validation" in problem.partition("there are the splits ")[2]
    assert "{split: train}" in refused(train=str(folder), split="validation", eval=str(folder))[0]


@pytest.mark.parametrize("given", ["some/set", "Some/Set", {"split": "train"}, {"path": "some/set"}])
def test_a_hub_id_is_not_its_own_held_out_set(given: Any) -> None:
    (problem,) = refused(train="some/set", eval=given)
    assert problem.endswith(
        "write `eval: {split: validation}` for another split, or `eval: 0.1` to hold a tenth of this one out"
    )


@pytest.mark.parametrize("given", ["other/set", {"split": "test"}, {"name": "small"}, {"split": "train[90%:]"}, 0.1])
def test_what_is_not_trained_on_may_be_held_out(given: Any) -> None:
    check_sources(DataSection(train="some/set", eval=given))


def test_a_file_has_neither_splits_nor_configurations(tmp_path: Path) -> None:
    file, other = (str(write_jsonl(tmp_path / f"{name}.jsonl", SPLITS[name])) for name in ("train", "extra"))
    assert "has neither splits nor" in refused(train=file, eval={"split": "validation"})[0]
    assert "has neither splits nor" in refused(train=file, eval={"path": other, "name": "small"})[0]
    assert "data.name" in refused(train=file, name="small")[0]
    said = "is a file, which has no splits; leave the key out"
    assert refused(train=file, split="validation") == [f"data.split: {file} {said}"]
    weighted = [other, {"path": file, "weight": 2}]
    assert [f"data.split: {one} {said}" for one in (other, file)] == refused(train=weighted, split="test")
    assert f"data.split: {file} {said}" in refused(train=["some/set", file], split="train[:9]")
    check_sources(DataSection(train="some/set", split="test", eval=file))


def test_a_saved_set_has_no_configurations(tmp_path: Path) -> None:
    datasets.Dataset.from_list(SPLITS["train"]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="no configurations"):
        build(train=str(tmp_path / "saved"), name="small")


def test_a_folder_without_a_list_has_no_configurations(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", SPLITS["train"])
    with pytest.raises(DataError, match="no configuration `small`"):
        build(train=str(tmp_path), name="small")


@pytest.mark.parametrize(
    ("given", "said"),
    [({"spilt": "test"}, "did you mean `split`"), ({}, "name a `split`"), ({"split": 3}, "eval: split")],
)
def test_mistakes_in_a_split_are_told(given: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataSection(train="some/set", eval=given)


def test_a_share_is_no_source() -> None:
    assert held_out_section(DataSection(train="some/set", eval=0.1)) is None
    assert held_out_section(DataSection(train="some/set")) is None
    assert name_held_out(DataSection(train="some/set", eval=0.1)) == ""
    assert name_held_out(DataSection(train="some/set", eval=["a.jsonl", "b.jsonl"])) == "a.jsonl, b.jsonl"
