"""From a person's own columns to a chat: by names, by templates, or by a function."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from phinetune.api.sections import data_section, holds_data
from phinetune.config.run import make_config
from phinetune.data.prepare.first_rows import look_at_first
from phinetune.data.read.messages import to_messages
from phinetune.data.read.row import Row
from phinetune.data.read.row_mapping import LeftOut, MappedRow, RowMapping
from phinetune.errors import ConfigError, DataError, RowError


def section_of(**data: Any) -> Any:
    return make_config({"data": data}).data


def mapped(fields: dict[str, Any], **data: Any) -> MappedRow:
    mapping = RowMapping.of(section_of(**data))
    assert mapping
    return mapping(fields)


def chat_of(fields: dict[str, Any], **data: Any) -> list[tuple[str, str]]:
    made = mapped(fields, **data)
    messages = made.with_system(to_messages(made.fields))
    return [(message["role"], message["content"]) for message in messages]


PAIR = {"user": "q", "assistant": "a"}


def test_columns_become_turns_and_the_rest_is_told() -> None:
    made = mapped(
        {"q": "Hi", "a": "Ho", "ctx": "Be brief.", "id": "x", "messages": "old"}, columns={**PAIR, "system": "ctx"}
    )
    assert made.fields["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert (made.fields["system"], made.fields["id"], made.hidden) == ("Be brief.", "x", {"messages": "old"})


def test_a_template_is_filled_with_columns_and_what_is_inside_them() -> None:
    fields = {
        "lang": "German",
        "text": "{braces} stay",
        "meta": {"tags": ["formal", "old"]},
        "target": "Ja",
        "a.b": "dot",
    }
    template = 'Translate to {lang} ({meta.tags.0}, {a.b}):\n{text} {{"json": 1}}'
    assert chat_of(fields, prompt=template, completion="{target}", system="You are terse.") == [
        ("system", "You are terse."),
        ("user", 'Translate to German (formal, dot):\n{braces} stay {"json": 1}'),
        ("assistant", "Ja"),
    ]


@pytest.mark.parametrize(
    ("value", "text", "notes"),
    [
        (3, "3", {"written"}),
        (2.5, "2.5", {"written"}),
        (True, "true", {"written"}),
        (datetime.datetime(2024, 5, 1), "2024-05-01", {"written"}),
        (datetime.datetime(2024, 5, 1, 9, 30), "2024-05-01 09:30:00", {"written"}),
        (["é", 1], '["é", 1]', {"as_json"}),
        ("[1]", "[1]", set()),
        ("007", "007", set()),
    ],
)
def test_a_value_that_is_no_text_is_written_and_noted(value: Any, text: str, notes: set[str]) -> None:
    made = mapped({"q": "Q", "a": value}, columns=PAIR)
    assert (made.fields["messages"][1]["content"], made.notes) == (text, notes)


@pytest.mark.parametrize("empty", [None, "", " \n", float("nan")])
def test_an_empty_answer_is_refused_and_an_empty_field_leaves_a_gap(empty: Any) -> None:
    with pytest.raises(RowError, match=r"`a` \(data.columns: assistant\) is empty"):
        mapped({"q": "Q", "a": empty}, columns=PAIR)
    with pytest.raises(RowError, match=r"`x`, `y` \(data.prompt\) are all empty"):
        mapped({"x": empty, "y": None, "a": "A"}, prompt="{x} {y}", columns={"assistant": "a"})
    made = mapped({"x": "X", "y": empty, "a": "A"}, prompt="{x}|{y}|", columns={"assistant": "a"})
    assert made.fields["messages"][0]["content"].startswith("X|")
    assert made.notes == {"gap"}
    assert chat_of({"q": "Q", "a": "A", "s": empty}, columns={**PAIR, "system": "s"})[0] == ("user", "Q")


def test_a_row_keeps_a_system_message_of_its_own() -> None:
    own = [
        {"role": "system", "content": "Mine."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    assert chat_of({"messages": own}, system_text="For all.")[0] == ("system", "Mine.")
    assert chat_of({"messages": own[1:]}, system_text="For {all}.")[0] == ("system", "For .")
    assert chat_of({"q": "Q", "a": "A", "s": "Mine."}, columns={**PAIR, "system": "s"}, system_text="x")[0] == (
        "system",
        "Mine.",
    )


def test_a_text_of_a_column_is_never_taken_for_turns() -> None:
    turns = '[{"role": "user", "content": "x"}]'
    assert chat_of({"q": turns, "a": "A"}, columns=PAIR) == [("user", turns), ("assistant", "A")]


def test_a_key_of_a_form_may_have_another_name() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert chat_of({"dialog": turns, "messages": 5}, columns={"messages": "dialog"}) == [
        ("user", "Q"),
        ("assistant", "A"),
    ]
    assert mapped({"body": "words"}, columns={"text": "body"}).fields == {"text": "words"}


def to_pair(fields: dict[str, Any]) -> Any:
    return {"list": [{"role": "user", "content": "Q"}], "dict": {"text": "t"}, "str": "t", "none": None, "int": 5}[
        fields["k"]
    ]


@holds_data
def through_function(kind: str) -> Any:
    mapping = RowMapping.of(make_config({"data": data_section({"train": "x", "row": to_pair})}).data)
    assert mapping
    return mapping({"k": kind}).fields


def test_a_function_makes_the_row() -> None:
    assert through_function("dict") == through_function("str") == {"text": "t"}
    assert through_function("list") == {"messages": [{"role": "user", "content": "Q"}]}
    with pytest.raises(LeftOut, match="left out by to_pair"):
        through_function("none")
    with pytest.raises(RowError, match=r"to_pair .data.row. returned int; return a dict"):
        through_function("int")
    with pytest.raises(RowError, match=r"to_pair .data.row. failed: KeyError"):
        through_function("other")
    name = holds_data(lambda: data_section({"row": to_pair})["row"])()
    assert name.startswith("function to_pair (sha256 ")
    with pytest.raises(DataError, match="is given in Python"):
        RowMapping.of(section_of(row=name))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"columns": {"usr": "q"}}, "did you mean `user`"),
        ({"columns": {"user": "q", "prompt": "q"}}, "which are one thing"),
        ({"columns": {"user": "q"}, "prompt": "{q}"}, "both say what the question is"),
        ({"prompt": "{q"}, "stands alone at character 1"),
        ({"prompt": "{} x"}, "names no column"),
        ({"system": "flod"}, "written as `system_text`"),
        ({"system": "A b.", "system_text": "c"}, "keep one of them"),
        ({"columns": {"tag": "a"}, "tag": "b"}, "keep one of them"),
        ({"row": "f", "prompt": "{q}"}, "makes the whole row"),
    ],
)
def test_what_is_said_twice_or_wrongly_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        section_of(**data)


def test_a_column_that_is_not_there_is_told_once_with_those_that_are() -> None:
    rows = [Row(f"qa.csv:{i}", {"Question": "q", "answer": "a", "n": 1}) for i in range(30)]
    with pytest.raises(DataError) as caught:
        look_at_first("qa.csv", rows, section_of(columns={"user": "question", "assistant": "answr"}))
    assert caught.value.problems == [
        f"data.columns: {key}: qa.csv has the columns Question, answer, n, and none is named {rest}"
        for key, rest in (
            ("user", "`question`; did you mean `Question`?"),
            ("assistant", "`answr`; did you mean `answer`?"),
        )
    ]
    with pytest.raises(DataError) as caught:
        look_at_first("qa.csv", rows, section_of())
    assert len(caught.value.problems) == 4
    assert "  columns: {user: Question, assistant: answer}" in caught.value.problems
