"""The check counts what a run would, and finds what stands out; a screen shows it."""

from __future__ import annotations

import gc
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chats.template_helpers import template_tokenizer
from data.check.check_helpers import ENCODER, check, kinds, places
from helpers import chat, write_jsonl
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.check import findings
from phinetune.data.check.check import check_files, describe_template
from phinetune.data.check.findings import KINDS
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.encode_rows import BATCH, RowEncoder
from phinetune.data.read.row import Row
from phinetune.screen.check import show_check

LONG = "Please tell me about the weather on the northern coast in the second week of March. "


def mixed(tmp_path: Path) -> Path:
    rows = [
        chat("How far is the sea?", "Five miles."),
        chat("long " * 40, "Cut."),
        chat("q", "long " * 40),
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        {"text": "Once upon a time.<|end|>"},
        {"messages": [{"role": "user", "content": "?"}]},
    ]
    return write_jsonl(tmp_path / "a.jsonl", rows)


def test_the_counts_are_those_of_a_run(tmp_path: Path) -> None:
    file = mixed(tmp_path)
    report = check(file, max_length=100)
    section = DataSection(train=str(file), invalid_rows="drop")
    run = build_chats(RowEncoder(section, ENCODER, 100)).train
    assert report.counts == run.report
    assert (report.counts.rows, report.counts.kept, report.counts.cut) == (6, 4, 1)
    assert report.lengths == [(len(row.input_ids), row.trainable) for row in run.encoded]
    sizes = [
        (len(row.input_ids), row.trainable, f"{file}:{line}")
        for row, line in zip(run.encoded, (1, 2, 4, 5), strict=True)
    ]
    assert sorted(report.longest) == sorted(sizes)[1:]
    assert places(report, "cut") == ["a.jsonl:2"]
    assert places(report, "too_long") == ["a.jsonl:3"]
    assert places(report, "roles") == ["a.jsonl:6"]


def test_a_row_that_the_run_may_drop_does_not_spoil_it(tmp_path: Path) -> None:
    file = mixed(tmp_path)
    assert check(file).spoiled
    report = check(file, invalid_rows="drop")
    assert not report.spoiled
    assert places(report, "roles") == ["a.jsonl:6"]


def test_broken_lines_spoil_a_run_whatever_it_may_drop(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(chat("a", "b")) + "\n{\n")
    report = check(file, invalid_rows="drop")
    assert report.spoiled
    assert (report.counts.rows, report.counts.kept) == (2, 1)


def test_places_are_kept_up_to_a_number_and_counted(
    tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"nothing": i} for i in range(50)] + [chat("a", "b")])
    monkeypatch.setattr(findings, "KEPT", 20)
    report = check(file)
    assert len(places(report, "form")) == 20
    assert report.findings.by_kind["form"].count == 50
    assert len(report.counts.lines()) == 2
    show_check(report, console)
    shown = console.file.getvalue()
    assert f"{file}:3" in shown
    assert f"{file}:4" not in shown
    assert "… and 47 more" in shown


def test_several_files_are_one_set(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [chat(LONG, "Rain.")])
    second = write_jsonl(tmp_path / "b.jsonl", [chat("Other?", "Yes."), chat(LONG.upper(), "rain. ")])
    report = check(first, second)
    assert report.counts.rows == 3
    assert places(report, "duplicate") == ["b.jsonl:2"]
    assert report.findings.by_kind["duplicate"].places[0].detail == f"like {first}:1"


def test_near_duplicates_are_found_and_unlike_rows_are_not(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(60)]
    other = " ".join([*words[:30], "changed", *words[31:]])
    rows = [
        chat(LONG, " ".join(words)),
        chat("Quite another matter, is it not, my dear?", " ".join(reversed(words))),
        chat(LONG, other),
        chat("Hi", "Ho"),
        chat("Hi", "Ha"),
    ]
    report = check(write_jsonl(tmp_path / "a.jsonl", rows))
    assert places(report, "near") == ["a.jsonl:3"]
    assert kinds(report) == {"near"}
    assert not report.spoiled


def test_rows_in_training_and_held_out_chats_are_found(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    train = write_jsonl(tmp_path / "a.jsonl", [chat("One?", "1"), chat(LONG, words), chat("One?", "1"), chat("x", "y")])
    # The same chat in another form, another one nearly alike, and one that only the held-out set has.
    others = [{"prompt": "one?", "completion": "1"}, chat(LONG, words + " more"), chat("z", "y")]
    held = write_jsonl(tmp_path / "h.jsonl", others)
    report = check(train, held_out=held)
    assert places(report, "shared") == ["a.jsonl:1", "a.jsonl:3"]
    assert report.findings.by_kind["shared"].places[0].detail == f"held out at {held}:1"
    assert places(report, "near_shared") == ["a.jsonl:2"]
    assert report.spoiled
    assert report.held_out is not None
    assert report.held_out.rows == 3


def test_held_out_rows_are_looked_at_too(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")])
    report = check(train, held_out=write_jsonl(tmp_path / "h.jsonl", [chat("c", "d"), {"nothing": 1}]))
    assert places(report, "form") == ["h.jsonl:2"]
    assert report.counts.rows == 1


def test_a_split_by_fraction_parts_no_copies_so_none_are_found_there(tmp_path: Path) -> None:
    rows = [chat(f"question {i}", "answer") for i in range(10)]
    report = check(write_jsonl(tmp_path / "a.jsonl", [*rows, *rows]), eval=0.3)
    assert kinds(report) == {"duplicate"}
    assert not report.spoiled


def test_personal_data_and_secrets_are_counted_and_never_shown(tmp_path: Path, console: Any) -> None:
    secrets = ["hf_" + "aB3" * 12, "ada.lovelace@analytical.engine.co.uk", "+44 20 7946 0958", "4111 1111 1111 1111"]
    rows = [chat(f"Write to {secrets[1]} or call {secrets[2]}.", "Done."), chat("Pay", f"{secrets[3]} {secrets[0]}")]
    report = check(write_jsonl(tmp_path / "a.jsonl", rows))
    assert dict(report.sensitive) == {"e-mail address": 1, "phone number": 1, "card number": 1, "API key": 1}
    assert places(report, "personal") == ["a.jsonl:1", "a.jsonl:1", "a.jsonl:2"]
    assert places(report, "secret") == ["a.jsonl:2"]
    assert report.spoiled
    show_check(report, console)
    shown = console.file.getvalue() + json.dumps(report.to_dict(), ensure_ascii=False)
    assert [secret for secret in secrets if secret in shown or secret[4:-2] in shown] == []


def test_a_set_that_never_ends_a_turn_is_found(tmp_path: Path) -> None:
    report = check(write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6, 7]}]))
    assert places(report, "no_stop") == ["a.jsonl"]
    assert report.spoiled


def test_what_the_template_drops_is_said(tmp_path: Path, console: Any) -> None:
    assert describe_template(make_encoder(template_tokenizer("phi-4-mini"))) == {
        "system messages": "kept",
        "tool turns": "kept",
        "tools": "kept, in the system message",
        "tool calls": "kept, between <|tool_call|> and <|/tool_call|>",
    }
    assert describe_template(make_encoder(template_tokenizer("phi-3-april-2024"))) == dict.fromkeys(
        ("system messages", "tool turns", "tools", "tool calls"), "dropped"
    )
    folded = make_encoder(template_tokenizer("phi-3-april-2024"), system="fold")
    assert describe_template(folded)["system messages"] == "folded into the first question (data.system)"
    file = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b", system="Be kind."), chat("c", "d")])
    encoder = make_encoder(template_tokenizer("phi-3-april-2024"))
    report = check_files([str(file)], [], RowEncoder(DataSection(), encoder, None))
    assert places(report, "system") == ["a.jsonl:1"]
    assert report.spoiled
    folding = make_encoder(template_tokenizer("phi-3-april-2024"), system="fold")
    assert not check_files([str(file)], [], RowEncoder(DataSection(system="fold"), folding, None)).spoiled
    show_check(report, console)
    assert "system messages dropped; tool turns dropped" in console.file.getvalue()


def test_languages_are_counted_and_odd_answers_found(tmp_path: Path) -> None:
    german = "Das Wetter an der Küste bleibt in der zweiten Märzwoche wechselhaft, mit Regen und kräftigem Wind. "
    english = "The weather on the coast stays changeable in the second week of March, with rain and a strong wind. "
    rows = [
        chat(english, english + "So."),
        chat(german, german + "So."),
        chat(english + "Well?", german),
        chat("a", "b"),
    ]
    report = check(write_jsonl(tmp_path / "a.jsonl", rows))
    assert dict(report.languages.counts) == {"en": 1, "de": 2}
    assert places(report, "language") == ["a.jsonl:3"]
    assert report.findings.by_kind["language"].places[0].detail == "question en, answer de"


def test_the_screen_shows_the_whole_at_a_glance(tmp_path: Path, console: Any) -> None:
    show_check(check(mixed(tmp_path), max_length=100), console)
    shown = console.file.getvalue()
    assert "6 rows (3 as messages, 1 as alpaca, 1 as text): 4 kept, 1 cut to fit, 2 dropped" in shown
    wanted = (
        "tokens a row",
        "rows by trainable tokens",
        "longest rows: ",
        "template: system messages kept",
        "turns: 4 user, 4 assistant\n",
        "✗ chats with unknown roles, no answer, or a turn out of place (1); correct the turns\n",
    )
    assert [words for words in wanted if words not in shown] == []
    assert len(shown.splitlines()) < 40


def test_nothing_that_stands_out_is_said_too(tmp_path: Path, console: Any) -> None:
    show_check(check(write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")])), console)
    assert console.file.getvalue().rstrip().endswith("Nothing stands out.")


def test_a_row_cannot_steer_the_terminal(tmp_path: Path, console: Console) -> None:
    rows = [{"messages": [{"role": "\x1b[2J\u202e", "content": "x"}]}, {"\x1b]0;x\x07": 1}, chat("a", "b")]
    show_check(check(write_jsonl(tmp_path / "a.jsonl", rows)), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_a_check_holds_a_batch_of_rows_at_a_time(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [[str(draw.random()) for _ in range(10)] for _ in range(4 * BATCH)]
    file = write_jsonl(tmp_path / "a.jsonl", [chat(" ".join(w), " ".join(w[::-1])) for w in words])
    held: list[int] = []

    def on_row() -> None:
        if len(held) % BATCH == 0:
            gc.collect()
            held.append(sum(type(one) is Row for one in gc.get_objects()))
        else:
            held.append(0)

    report = check_files([str(file)], [str(file)], RowEncoder(DataSection(), ENCODER, None), on_row)
    assert len(held) == 8 * BATCH
    assert 0 < max(held) <= 2 * BATCH
    assert report.findings.by_kind["shared"].count == 4 * BATCH


def test_every_kind_has_a_title_and_advice() -> None:
    assert [kind for kind, about in KINDS.items() if not about.title or not about.advice] == []


@pytest.mark.parametrize("reverse", [False, True])
def test_a_check_is_the_same_every_time(tmp_path: Path, reverse: bool) -> None:
    rows = [chat(LONG + str(i), LONG * 2 + str(i)) for i in range(20)]
    file = write_jsonl(tmp_path / "a.jsonl", rows[::-1] if reverse else rows)
    assert check(file).to_dict() == check(file).to_dict()


def test_the_real_tokenizer_and_the_check_agree_with_a_run(phi3_tokenizer: Any, tmp_path: Path) -> None:
    file = mixed(tmp_path)
    encoder = make_encoder(phi3_tokenizer)
    report = check_files([str(file)], [], RowEncoder(DataSection(), encoder, 60))
    section = DataSection(train=str(file), invalid_rows="drop")
    assert report.counts == build_chats(RowEncoder(section, encoder, 60)).train.report


def test_a_rows_message_is_not_judged_by_another_tokenizers_tokens(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat("What is <|end|>?", "a"), chat("And <|im_end|>?", "b")])
    report = check(file)
    assert places(report, "typed_token") == ["a.jsonl:1"]
    assert places(report, "foreign_markup") == ["a.jsonl:2"]
    assert not report.spoiled
    chatml = byte_tokenizer(300)
    chatml.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    other = check_files([str(file)], [], RowEncoder(DataSection(), make_encoder(chatml), None))
    assert places(other, "typed_token") == ["a.jsonl:1", "a.jsonl:2"]


def screen(report: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_check(report, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_what_is_not_used_is_told_once_a_set(tmp_path: Path) -> None:
    rows = [{**chat(f"How far is {i}?", f"{i} miles."), "id": i, "topic": "sea"} for i in range(5)]
    rows[0]["messages"][1]["reasoning_content"] = "Hm."
    held = write_jsonl(tmp_path / "h.jsonl", [{**chat("Why?", "So."), "score": 3}])
    report = check(write_jsonl(tmp_path / "a.jsonl", rows), held_out=held)
    text = screen(report)
    assert text.count("columns not used") == 2
    assert "columns not used: turns[].reasoning_content (1), topic (5), id (5)" in text
    assert "columns not used: score (1)" in text
    assert "Nothing else stands out." in text
    assert report.to_dict()["unused"] == {"topic": 5, "turns[].reasoning_content": 1}
    assert report.to_dict()["held_out"]["unused_values"] == {"score": 1}


def test_nothing_stands_out_where_all_is_used(tmp_path: Path) -> None:
    text = screen(check(write_jsonl(tmp_path / "a.jsonl", [chat("How far is the sea?", "Five miles.")])))
    assert "Nothing stands out." in text
    assert "not used" not in text


def test_pieces_of_a_text_are_one_row(tmp_path: Path) -> None:
    rows = [{"text": "Once upon a time. " * 20}, {"messages": [{"role": "user", "content": "?"}]}, {"text": "Once."}]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
    ticks: list[int] = []
    encode = RowEncoder(DataSection(), ENCODER, 100)
    report = check_files([str(file)], [str(file)], encode, on_row=lambda: ticks.append(1))
    assert len(ticks) == 8
    assert (report.counts.rows, report.counts.kept, report.counts.in_pieces) == (4, 3, 2)
    assert sorted(report.left_out) == [0, 1, 2, 3]
    assert [place.rpartition(":")[2] for place in places(report, "duplicate")] == ["4"]
    assert len(report.lengths) == report.counts.pieces + 1


def test_a_table_with_a_blank_answer_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd,1 and 2,3\nAdd,1 and 4,\n")
    report = check(tmp_path / "a.csv")
    (place,) = report.findings.by_kind["content"].places
    assert place.detail == "`output` is empty, and the row needs its text"
    assert "form" not in kinds(report)


def test_ids_beside_a_chat_hide_no_near_copy(tmp_path: Path) -> None:
    rows = [{**chat(LONG, f"It will rain on day {i}."), "input_ids": [i]} for i in (3, 4)]
    assert places(check(write_jsonl(tmp_path / "a.jsonl", rows)), "near") == ["a.jsonl:2"]


def test_copies_among_rows_of_ids_that_are_too_long_are_found(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, last]} for last in (8, 9, 8)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    report = check(file, held_out=write_jsonl(tmp_path / "h.jsonl", rows[1:2]), max_length=3)
    assert places(report, "duplicate") == ["a.jsonl:3"]
    assert places(report, "shared") == ["a.jsonl:2"]
