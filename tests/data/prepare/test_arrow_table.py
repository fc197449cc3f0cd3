"""Large sets: by many processes into files, and the same set in the end as in memory."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from helpers import chat, write_jsonl
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare import arrow_table as table
from phinetune.data.prepare import build_sets as build
from phinetune.data.prepare import cache
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import Chats, ChatSet
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.read import source_parts as sources
from phinetune.engine.packing import fill_rows
from phinetune.errors import DataError
from phinetune.manifest import MANIFEST

ENCODER = make_encoder(byte_tokenizer(300))
LONGEST = 90


@pytest.fixture(autouse=True)
def _small_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Sets of more than ten rows are large, pieces have four rows, and entries are kept in a folder of the test's."""
    monkeypatch.setattr(build, "SMALL", 10)
    monkeypatch.setattr(sources, "PIECE", 4)
    monkeypatch.setattr(table, "cores", lambda: 1)
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    environ = os.environ
    yield
    os.environ = environ  # noqa: B003 datasets puts a copy in its place where it starts processes


def a_row(i: int) -> dict[str, Any]:
    """Rows of every fate: chats of one and two exchanges, some to cut, some to drop, text and ids."""
    if i % 7 == 3:
        return {"text": f"Once {i}.<|end|>"}
    if i % 11 == 5:
        return {"input_ids": [5, 6, i % 200]}
    if i % 5 == 4:
        return chat("long " * 30, f"yes {i}", "and?", "no")
    if i % 13 == 8:
        return chat("short", "answer " * 30)
    return chat(f"What is {i}?", f"It is {i}.", *(["<|end|>", "ü🙂"] if i % 3 else []))


ROWS = [{**a_row(i), **({"kind": i % 3} if i % 4 else {})} for i in range(60)]


def both(monkeypatch: pytest.MonkeyPatch, **section: Any) -> tuple[Chats, Chats]:
    """The section's sets by way of files, and in memory."""
    large = build_chats(RowEncoder(DataSection(**section), ENCODER, LONGEST))
    with monkeypatch.context() as patch:
        patch.setattr(build, "SMALL", 10**9)
        return large, build_chats(RowEncoder(DataSection(**section), ENCODER, LONGEST))


def same(large: ChatSet | None, small: ChatSet | None) -> None:
    assert large is not None
    assert small is not None
    assert large.report == small.report
    assert list(large.encoded) == list(small.encoded)
    assert list(large.chats) == list(small.chats)
    assert list(large.places) == list(small.places)
    assert list(large.tags) == list(small.tags)
    assert list(large.lengths()) == list(small.lengths())
    assert large.encoded[1] == small.encoded[1]
    assert large.encoded[-3:] == small.encoded[-3:]
    assert large.chats[:2] == small.chats[:2]
    columns = ["input_ids", "labels"]
    assert large.dataset().select_columns(columns)[:] == small.dataset()[:]


def entries(tmp_path: Path) -> list[Path]:
    return sorted(one for one in (tmp_path / "home" / "data").iterdir() if one.is_dir())


def test_the_set_is_the_same_as_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    large, small = both(monkeypatch, train=str(file), eval=0.2)
    same(large.train, small.train)
    same(large.held_out, small.held_out)
    assert large.held_out
    assert large.train.report.cut + large.held_out.report.cut  # these rows share a question, and so a side
    assert large.train.report.dropped


def test_processes_give_the_same_rows_in_the_same_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "cores", lambda: 3)
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    large, small = both(monkeypatch, train=str(file))
    same(large.train, small.train)
    assert len(list(entries(tmp_path)[0].glob("rows*.arrow"))) == 3


@pytest.mark.parametrize(
    "section",
    [
        {
            "train": [{"path": "a.jsonl", "weight": 2.5}, {"path": "b.jsonl", "weight": 0.4}],
            "eval": 0.2,
            "tag": "kind",
        },
        {"train": ["a.jsonl", "b.jsonl"], "limit": 31, "eval": "c.jsonl"},
        {"train": "a.jsonl", "limit": 17, "invalid_rows": "drop", "loss_on": "last"},
        {"train": [{"path": "a.jsonl", "weight": 1.5}, "b.jsonl"], "eval": 0.2, "train_share": 0.3},
        {"train": ["a.jsonl", "b.jsonl"], "train_share": 0.5, "group": "kind"},
    ],
    ids=["weights", "limit over files", "limit in a file", "a share", "a share by groups"],
)
def test_weights_limits_and_held_out_files_are_the_same_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, section: dict[str, Any]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:25])
    write_jsonl(tmp_path / "b.jsonl", ROWS[25:])
    write_jsonl(tmp_path / "c.jsonl", ROWS[20:])
    monkeypatch.chdir(tmp_path)
    large, small = both(monkeypatch, **section)
    same(large.train, small.train)
    if "eval" in section:
        same(large.held_out, small.held_out)


def write_source(path: Path) -> Path:
    """Twenty-three chats in the kind of source that the name asks for."""
    rows = [chat(f"What is {i}?", "This!") for i in range(23)]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "completion"])
            writer.writerows([f"two\nlines {i}", "yes"] for i in range(23))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=9)
    elif path.suffix == ".ndjson":
        lines = "".join(json.dumps(row) + "\r\n\r\n" for row in rows)
        path.write_text("\n \n" + lines + "  ", encoding="utf-8-sig")
    else:
        Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "folder", "wide.ndjson"])
def test_every_kind_of_source_gives_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    large, small = both(monkeypatch, train=str(write_source(tmp_path / name)), eval=0.3)
    same(large.train, small.train)
    same(large.held_out, small.held_out)
    assert not list(entries(tmp_path)[0].glob("source.*"))


def problems_of(file: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        build_chats(RowEncoder(DataSection(train=str(file)), ENCODER, LONGEST))
    return caught.value.problems


def test_broken_places_are_all_told_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2], lines[40], lines[59] = b"{\n", b'{"text": "caf\xe9"}\n', b"[1]"
    file.write_bytes(b"".join(lines))
    problems = problems_of(file)
    assert [problem.partition(": ")[0] for problem in problems] == [f"{file}:3", f"{file}:41", f"{file}:60"]
    assert not entries(tmp_path)
    monkeypatch.setattr(build, "SMALL", 10**9)
    assert problems_of(file) == problems


def test_rows_that_cannot_be_used_are_all_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"nothing": 1} if i in (7, 50) else row for i, row in enumerate(ROWS)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    problems = problems_of(file)
    assert [problem.partition(": ")[0] for problem in problems[:2]] == [f"{file}:8", f"{file}:51"]
    assert "invalid_rows" in problems[-1]
    assert not entries(tmp_path)
    large, small = both(monkeypatch, train=str(file), invalid_rows="drop")
    same(large.train, small.train)
    assert problems_of(file) == problems  # the cached table does not hide them


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of which a table was written, in order."""
    written: list[str] = []
    write = build.write_table
    monkeypatch.setattr(build, "write_table", lambda path, *rest: (written.append(path), write(path, *rest)))
    return written


def build_file(file: Path, max_length: int = LONGEST, **section: Any) -> ChatSet:
    return build_chats(RowEncoder(DataSection(train=str(file), **section), ENCODER, max_length)).train


@pytest.mark.parametrize("changed", [{}, {"eval": 0.5}, {"seed": 3}, {"invalid_rows": "drop"}], ids=str)
def test_a_set_is_prepared_once(tables: list[str], tmp_path: Path, changed: dict[str, Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    build_file(file)
    build_file(file, **changed)
    assert tables == [str(file)]


def test_a_file_that_was_moved_is_not_prepared_again(tables: list[str], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    build_file(file)
    build_file(file.rename(tmp_path / "b.jsonl"))
    assert tables == [str(file)]


@pytest.mark.parametrize(
    "changed",
    [{"loss_on": "last"}, {"overlong": "drop"}, {"overlap": 9}, {"limit": 12}, {"system": "fold"}, {"max_length": 80}],
    ids=str,
)
def test_other_settings_have_a_table_of_their_own(tables: list[str], tmp_path: Path, changed: dict[str, Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    build_file(file)
    build_file(file, **changed)
    assert tables == [str(file)] * 2


def test_a_file_that_has_changed_is_prepared_again(tables: list[str], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    before = build_file(file).encoded[-1]
    write_jsonl(file, [*ROWS[:-1], chat("new", "row")])
    assert build_file(file).encoded[-1] != before
    assert len(tables) == 2


@pytest.mark.parametrize("name", cache.CODE)
def test_the_code_that_a_key_depends_on_is_there(name: str) -> None:
    place = Path(cache.__file__).parents[2] / name
    assert place.is_file() or list(place.glob("*.py"))


def test_an_encoder_of_rows_is_told_from_another_by_its_code() -> None:
    """Two objectives must not find each other's prepared sets."""

    class Louder(RowEncoder):
        columns = ("loudness",)

    one, other = (kind(DataSection(), ENCODER, None).identity() for kind in (RowEncoder, Louder))
    assert one["rows"] != other["rows"]
    assert one["source"] != other["source"]


def test_an_encoder_of_rows_is_told_from_its_like_with_another_setting() -> None:
    @dataclass(frozen=True)
    class Trimmed(RowEncoder):
        most: int = 3

    three, four = (Trimmed(DataSection(), ENCODER, None, most).identity() for most in (3, 4))
    assert three != four
    assert three == Trimmed(DataSection(), ENCODER, None).identity()


def test_a_tokenizer_or_template_of_its_own_has_an_entry_of_its_own() -> None:
    one, other, third = byte_tokenizer(300), byte_tokenizer(300), byte_tokenizer()
    key = cache.cache_key({}, one)
    one("cut", truncation=True, max_length=1)
    assert cache.cache_key({}, one) == cache.cache_key({}, other) == key
    other.chat_template += " "
    keys = [cache.cache_key({}, other), cache.cache_key({}, third), cache.cache_key({"a": 1}, one)]
    assert len({key, *keys}) == 4


MANIFESTS = ["[", "[]", "{}", "null", "", '{"other.arrow": ""}', '{"rows.arrow": null}']


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", *MANIFESTS])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, harm: str) -> None:
    section = DataSection(train=str(write_jsonl(tmp_path / "a.jsonl", ROWS)))
    rows = list(build_chats(RowEncoder(section, ENCODER, LONGEST)).train.encoded)
    entry = entries(tmp_path)[0]
    file = next(entry.glob("rows*.arrow"))
    content = bytearray(file.read_bytes())
    file.unlink()  # what is mapped stays as it was
    if harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm in MANIFESTS:
        if len(harm) < 3:  # with the rows or without: a manifest that names nothing vouches for nothing
            file.write_bytes(content)
        (entry / MANIFEST).write_text(harm)
    again = build_chats(RowEncoder(section, ENCODER, LONGEST)).train
    assert list(again.encoded) == rows
    assert entries(tmp_path) == [entry]


def test_a_failure_leaves_no_entry_and_rests_of_a_killed_process_go(tmp_path: Path) -> None:
    folder = cache.cache_folder() / "data"
    left = folder / ".key.partial-x"
    left.mkdir(parents=True)

    def fail(stage: Path) -> None:
        (stage / "rows.arrow").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="no space is left"):
        cache.cached_folder("key", fail)
    assert not entries(tmp_path)
    assert not left.exists()


def _prepare(file: str, answers: Any) -> None:
    made = build_chats(RowEncoder(DataSection(train=file), ENCODER, LONGEST)).train
    answers.put([row.input_ids for row in made.encoded])


def test_two_processes_at_once_read_one_entry(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    workers = [context.Process(target=_prepare, args=(file, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2]
    assert len(entries(tmp_path)) == 1


def test_a_small_set_keeps_nothing_and_starts_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "write_table", None)
    file = write_jsonl(tmp_path / "a.jsonl", ROWS[:10])
    assert build_chats(RowEncoder(DataSection(train=str(file)), ENCODER, LONGEST)).train.report.rows == 10
    assert (
        build_chats(
            RowEncoder(DataSection(train=str(write_jsonl(file, ROWS)), limit=10), ENCODER, None)
        ).train.report.rows
        == 10
    )
    assert not (tmp_path / "home").exists()


def test_rows_on_disk_are_filled_like_rows_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    large, small = both(monkeypatch, train=str(write_jsonl(tmp_path / "a.jsonl", ROWS)))
    filled = [fill_rows(one.train.dataset(), LONGEST) for one in (large, small)]
    columns = ["input_ids", "labels", "seq_lengths"]
    assert filled[0].select_columns(columns)[:] == filled[1].select_columns(columns)[:]
