"""The same chats give the same ids, labels and tags from every form of storage: in memory, as Arrow files, streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.prepare.storage_helpers import CHATS, STORAGE, Rows, data_set, jsonl, make_encoder_with_tools, wide
from phinetune.config.data import DataSection
from phinetune.data.check.check import check_files
from phinetune.data.check.fix import write_fixed
from phinetune.data.prepare import arrow_table as table
from phinetune.data.prepare import build_sets as build
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.collect_sets import build_set
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.read import source_parts as sources
from phinetune.data.read.datasets_library import number_rows
from phinetune.engine.examples import Encoded

ENCODER = make_encoder_with_tools()


def encoder(source: Path, **section: Any) -> RowEncoder:
    return RowEncoder(DataSection(train=str(source), tag="kind", **section), ENCODER, 3000)


def built(source: Path, **section: Any) -> ChatSet:
    return build_chats(encoder(source, **section)).train


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> ChatSet:
    return built(jsonl(tmp_path_factory.mktemp("wanted") / "a", CHATS))


def same(made: ChatSet, wanted: ChatSet) -> None:
    assert list(made.encoded) == list(wanted.encoded)
    assert list(made.tags) == list(wanted.tags)
    assert list(made.chats) == list(wanted.chats)
    assert made.report.unused_columns() == wanted.report.unused_columns() == "id (200)"


def test_the_chats_hold_what_storage_could_change(wanted: ChatSet) -> None:
    assert wanted.report.kept == len(wanted.encoded) == 200
    texts = "".join(ENCODER.tokenizer.decode(row.input_ids) for row in wanted.encoded)
    for words in ('{"city": "Rome"}', '{"city": "Kyiv"}', '"days": 5', "<think>", "Röm", '"metric": false', "NA"):
        assert words in texts
    as_text = '{"zone": null, "days": 2.0, "city": "Graz"}'
    assert as_text in texts
    assert texts.count("null") == texts.count('"rain": null') + texts.count(as_text)
    assert set(wanted.tags) == {"a", "b", "", "NA"}


@pytest.mark.parametrize("write", STORAGE.values(), ids=STORAGE)
def test_every_form_of_storage_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: ChatSet, write: Callable[[Path, Rows], Path]
) -> None:
    source = write(tmp_path / "source", CHATS)
    same(built(source), wanted)
    streamed = built(source, streaming=True)
    rows = sorted((row["input_ids"], row["labels"]) for row in streamed.dataset())
    assert rows == sorted((row.input_ids, row.labels) for row in wanted.encoded)
    monkeypatch.setattr(build, "SMALL", 10)
    monkeypatch.setattr(sources, "PIECE", 16)
    monkeypatch.setattr(table, "cores", lambda: 1)
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    same(built(source), wanted)
    assert list(built(source, limit=31).encoded) == list(wanted.encoded)[:31]


def test_a_data_set_in_memory_gives_the_same(wanted: ChatSet) -> None:
    rows = number_rows("memory", data_set(CHATS))
    same(build_set("memory", rows, encoder(Path("memory"))), wanted)


@pytest.mark.parametrize("write", [wide, *STORAGE.values()], ids=["UTF-16", *STORAGE])
def test_a_cleaned_set_gives_the_same_from_every_form(
    tmp_path: Path, wanted: ChatSet, write: Callable[[Path, Rows], Path]
) -> None:
    """A UTF-16 file is refused; its cleaned copy is the set. Rows that --fix would mend or leave out are not in it."""
    sound = [row for row in CHATS if row["messages"][-1]["content"]]
    kept = [one for one, row in zip(wanted.encoded, CHATS, strict=True) if row["messages"][-1]["content"]]
    report = check_files([str(write(tmp_path / "source", sound))], [], encoder(tmp_path))
    report.left_out.clear()
    write_fixed(report, tmp_path / "clean.jsonl")
    made: list[Encoded] = list(built(tmp_path / "clean.jsonl").encoded)
    assert made == kept
