"""A run's sets: counted, split by seed, refused where they would spoil a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import chat, write_jsonl
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare import build_sets
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import Chats
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.report import DataReport
from phinetune.errors import DataError

ENCODER = make_encoder(byte_tokenizer(300))


def build(max_length: int | None = None, **section: Any) -> Chats:
    return build_chats(RowEncoder(DataSection(**section), ENCODER, max_length))


def questions(made: Any) -> list[str]:
    return [next(m["content"] for m in messages if m["role"] == "user") for messages in made.chats]


def test_the_report_counts_rows_and_tokens(chats: Path) -> None:
    made = build(train=str(chats))
    report = made.train.report
    assert (report.rows, report.kept, report.cut, dict(report.dropped)) == (12, 12, 0, {})
    assert dict(report.forms) == {"messages": 12}
    assert report.tokens == sum(len(row.input_ids) for row in made.train.encoded)
    assert report.trainable_tokens == sum(label != -100 for row in made.train.encoded for label in row.labels)
    assert report.longest == max(len(row.input_ids) for row in made.train.encoded)
    assert made.held_out is None
    assert "12 rows (12 as messages): 12 kept" in report.lines()[0]


def test_a_set_without_a_known_form_has_no_empty_brackets() -> None:
    assert DataReport("a.jsonl", rows=1).lines()[0].startswith("a.jsonl: 1 rows: 0 kept")


def test_the_dataset_holds_ids_and_labels(chats: Path) -> None:
    made = build(train=str(chats)).train
    assert made.dataset()[3] == {"input_ids": made.encoded[3].input_ids, "labels": made.encoded[3].labels}


def test_a_fraction_is_held_out_by_seed(chats: Path) -> None:
    made = build(train=str(chats), eval=0.25)
    assert made.held_out is not None
    assert (len(made.train), len(made.held_out)) == (9, 3)
    assert not set(questions(made.train)) & set(questions(made.held_out))
    again, other = build(train=str(chats), eval=0.25), build(train=str(chats), eval=0.25, seed=1)
    assert questions(again.held_out) == questions(made.held_out)
    assert questions(other.held_out) != questions(made.held_out)


def test_a_fraction_that_leaves_nothing_is_refused(chats: Path) -> None:
    with pytest.raises(DataError, match="leaves one side empty"):
        build(train=str(chats), eval=0.01)


def test_several_files_and_a_limit(chats: Path, tmp_path: Path) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", [chat("last", "one")])
    assert len(build(train=[str(chats), str(more)]).train) == 13
    assert len(build(train=[str(chats), str(more)], limit=5).train) == 5
    assert questions(build(train=str(chats), eval=[str(more)]).held_out) == ["last"]


def test_bad_rows_are_all_listed_with_file_and_line(tmp_path: Path) -> None:
    rows = [chat("a", "b"), {"messages": [{"role": "user", "content": "x"}]}, {"nothing": 1}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        build(train=str(file))
    assert caught.value.problems[0].startswith(f"{file}:2: no assistant turn")
    assert caught.value.problems[1].startswith(f"{file}:3: the keys (nothing)")
    made = build(train=str(file), invalid_rows="drop").train
    assert len(made) == 1
    assert sum(made.report.dropped.values()) == 2


def test_a_template_that_refuses_a_chat_is_named_with_the_row(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else '' }}"
    )
    file = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), chat("bad", "b"), chat("c", "d")])
    with pytest.raises(DataError) as caught:
        build_chats(RowEncoder(DataSection(train=str(file)), make_encoder(tokenizer), None))
    assert caught.value.problems[0] == f"{file}:2: the chat template refuses it: no bad words"


def test_long_chats_are_cut_or_dropped_and_counted(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), chat("long " * 50, "b"), chat("a", "long " * 50)])
    cut = build(60, train=str(file)).train
    assert (len(cut), cut.report.cut) == (2, 1)
    assert dict(cut.report.dropped) == {"longer than 60 tokens": 1}
    assert all(len(row.input_ids) <= 60 for row in cut.encoded)
    assert len(build(60, train=str(file), overlong="drop").train) == 1


@pytest.mark.parametrize("rows", [[], [chat("a", "long " * 50)]], ids=["empty file", "all rows too long"])
def test_a_set_with_nothing_to_use_is_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="no chat to use"):
        build(60, train=str(file))


def test_a_set_that_never_ends_a_turn_is_refused(chats: Path) -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else '' }}"
    )
    with pytest.raises(DataError, match="never learn to stop"):
        build_chats(RowEncoder(DataSection(train=str(chats)), make_encoder(tokenizer), None))


def numbered(tmp_path: Path, name: str, count: int) -> Path:
    return write_jsonl(tmp_path / name, [chat(f"{name} {i}", "yes") for i in range(count)])


def test_a_weight_repeats_or_draws_the_rows_of_its_file(tmp_path: Path) -> None:
    first, second, third = (str(numbered(tmp_path, name, 8)) for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    files = [first, {"path": second, "weight": 2.5}, {"path": third, "weight": 0.25}]
    asked = questions(build(train=files).train)
    assert asked[:8] == [f"a.jsonl {i}" for i in range(8)]
    times = [asked.count(f"b.jsonl {i}") for i in range(8)]
    assert sorted(times) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert sum(q.startswith("c.jsonl") for q in asked) == 2
    assert asked == sorted(asked, key=lambda q: (q[0], int(q.split()[1])))
    assert questions(build(train=files).train) == asked
    assert questions(build(train=files, seed=1).train) != asked
    assert questions(build(train=[{"path": first}]).train) == asked[:8]
    assert build(train=files).train.report.source == f"{first}, {second} × 2.5, {third} × 0.25"


def test_a_repeated_row_stands_on_one_side_of_the_split(tmp_path: Path) -> None:
    files = [{"path": str(numbered(tmp_path, "a.jsonl", 20)), "weight": 3}]
    made = build(train=files, eval=0.25)
    assert made.held_out is not None
    assert (len(made.train), len(made.held_out)) == (45, 5)
    assert not set(questions(made.train)) & set(questions(made.held_out))


def test_the_split_is_the_same_with_and_without_weights(tmp_path: Path) -> None:
    file = str(numbered(tmp_path, "a.jsonl", 20))
    once, twice = build(train=file, eval=0.25), build(train=[{"path": file, "weight": 2}], eval=0.25)
    assert questions(once.held_out) == questions(twice.held_out)


def test_a_weight_that_draws_nothing_leaves_an_empty_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the set is empty"):
        build(train=[{"path": str(numbered(tmp_path, "a.jsonl", 4)), "weight": 0.1}])


def test_sets_of_text_and_ids_train_like_chats(tmp_path: Path) -> None:
    rows = [{"text": "Once.<|end|>"}, {"input_ids": [5, 6]}, chat("a", "b")]
    made = build(train=str(write_jsonl(tmp_path / "a.jsonl", rows))).train
    assert dict(made.report.forms) == {"text": 1, "tokens": 1, "messages": 1}
    assert len(made.dataset()) == 3
    assert questions(made) == ["a"]


def test_missing_sources_are_told_together() -> None:
    with pytest.raises(DataError) as caught:
        build(train="a.jsonl", eval="b.csv")
    assert caught.value.problems == ["a.jsonl: no such file", "b.csv: no such file"]


@pytest.mark.parametrize("way", ["small", "large", "stream"])
def test_files_behind_the_limit_are_named(
    way: str, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    if way == "large":
        monkeypatch.setattr(build_sets, "SMALL", 3)
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", rows[i : i + 4])) for i in (0, 4, 8)]
    for limit, unused in ((4, files[1:]), (5, files[2:]), (12, []), (None, [])):
        caplog.clear()
        made = build(train=files, limit=limit, streaming=way == "stream")
        assert made.train.report.rows == min(limit or 12, 12)
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            f"{file}: no row within data.limit: {limit}" for file in unused
        ]


@pytest.mark.parametrize("more", [{}, {"eval": 0.25}, {"streaming": True}], ids=str)
def test_a_tag_that_no_row_has_is_told_with_the_columns(chats: Path, more: dict[str, Any], caplog: Any) -> None:
    name = build(train=str(chats), tag="nosuch", **more).facts()["held_out" if "eval" in more else "train"]["source"]
    assert f"data.tag nosuch: no row of {name} has a column of that name; there are the columns messages" in caplog.text


def test_a_tag_that_held_out_rows_have_is_not_told(chats: Path, tmp_path: Path, caplog: Any) -> None:
    tagged = str(write_jsonl(tmp_path / "h.jsonl", [{**chat("new", "one"), "topic": "x"}, chat("other", "one")]))
    build(train=str(chats), eval=tagged, tag="topic")
    assert "data.tag" not in caplog.text
    build(train=tagged, eval=str(chats), tag="topic")
    assert f"data.tag topic: no row of {chats} has" in caplog.text
    assert "columns messages, topic" not in caplog.text  # those of the training file


@pytest.mark.parametrize(
    ("length", "section", "told"),
    [
        (200, {}, "data.overlap has no effect: no text was longer than 200 tokens"),
        (None, {}, "data.overlap has no effect: no text was cut into pieces"),
        (90, {"overlong": "drop"}, "data.overlap has no effect: no text was cut into pieces"),
        (90, {}, ""),
        (90, {"overlap": 1}, ""),
        (200, {"overlap": 1}, ""),
        (200, {"streaming": True}, ""),
    ],
    ids=str,
)
def test_an_overlap_of_no_pieces_is_told(
    length: int | None, section: dict[str, Any], told: str, tmp_path: Path, caplog: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat("hi", "there"), {"text": "word " * 20}])
    build(length, **{"train": str(file), "overlap": 7, **section})
    assert told in caplog.text
    assert ("data.overlap" in caplog.text) == bool(told)
