"""Rows of preferences as examples: by the user's columns, and dropped where they teach nothing."""

from __future__ import annotations

from typing import Any

import pytest

from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare.encode_answers import EQUAL, JudgedRows, PairRows, parts_of
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome
from phinetune.data.prepare.report import DataReport
from phinetune.data.read.held_data import hold_function, holding
from phinetune.data.read.row import Row
from phinetune.errors import ConfigError

TOKENIZER = byte_tokenizer(300)
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def outcomes(kind: type[RowEncoder], fields: dict[str, Any], **section: Any) -> list[RowOutcome]:
    return list(kind(DataSection(**section), make_encoder(TOKENIZER), None)([Row("a.jsonl:1", fields)]))


def texts(made: RowOutcome) -> list[str]:
    assert made.encoded, made.reason
    return [str(TOKENIZER.decode(part.input_ids)) for part in parts_of(made.encoded)]


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ({"columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}, {"q": "Why?", "good": "So.", "bad": "No."}),
        ({"columns": {"user": "a.q"}}, {"a": {"q": "Why?"}, "chosen": "So.", "rejected": "No."}),
        ({"prompt": "{word}?"}, {"word": "Why", "prompt": "unused", "chosen": "So.", "rejected": "No."}),
    ],
    ids=["columns", "a column inside another", "template"],
)
@pytest.mark.parametrize("kind", [PairRows, JudgedRows])
def test_pairs_are_made_of_the_users_columns(
    kind: type[PairRows], section: dict[str, Any], fields: dict[str, Any]
) -> None:
    plain, mapped = outcomes(kind, PAIR), outcomes(kind, fields, **section)
    assert [one.encoded for one in mapped] == [one.encoded for one in plain]
    assert all(one.encoded for one in plain)
    assert mapped[0].audit.in_order() == (["prompt"] if fields.get("prompt") else [])


def test_judged_rows_are_made_of_the_users_columns() -> None:
    (plain,) = outcomes(JudgedRows, {"prompt": "Why?", "completion": "So.", "label": False})
    for section in (
        {"columns": {"user": "q", "assistant": "a", "label": "ok"}},
        {"prompt": "{q}", "completion": "{a}"},
    ):
        fields = {"q": "Why?", "a": "So.", "ok" if "columns" in section else "kto_tag": False}
        (mapped,) = outcomes(JudgedRows, fields, **section)
        assert mapped.encoded == plain.encoded
        assert mapped.audit.in_order() == []


@pytest.mark.parametrize("kind", [PairRows, JudgedRows])
def test_the_system_text_stands_before_every_answer_but_for_a_rows_own(kind: type[PairRows]) -> None:
    made = outcomes(kind, PAIR, system_text="Be brief.")
    found = [text.partition("Why?")[0] for one in made for text in texts(one)]
    assert len(found) == 2
    assert all("Be brief." in before for before in found)
    own = outcomes(kind, {**PAIR, "system": "Be long."}, system_text="Be brief.")
    assert all("Be long." in text and "brief" not in text for one in own for text in texts(one))
    assert "own_system" in own[0].audit.notes


def test_a_system_column_reaches_rows_of_openais_form() -> None:
    """Their question stands in an object of its own."""
    asked = {"messages": [{"role": "user", "content": "Why?"}]}
    answers = {f"{name}_output": [{"role": "assistant", "content": name}] for name in ("preferred", "non_preferred")}
    (made,) = outcomes(PairRows, {"input": asked, **answers, "context": "Be brief."}, columns={"system": "context"})
    assert all("Be brief." in text for text in texts(made))


@pytest.mark.parametrize("kind", [PairRows, JudgedRows])
def test_a_function_makes_pairs_or_leaves_rows_out(kind: type[PairRows]) -> None:
    def swapped(row: dict[str, Any]) -> dict[str, Any] | None:
        return {"prompt": row["q"], "chosen": row["b"], "rejected": row["a"]} if row["q"] else None

    with holding():
        name = hold_function(swapped)
        made = outcomes(kind, {"q": "Why?", "a": "No.", "b": "So."}, row=name)
        (left,) = outcomes(kind, {"q": "", "a": "No.", "b": "So."}, row=name)
    assert [one.encoded for one in made] == [one.encoded for one in outcomes(kind, PAIR)]
    assert left.encoded is None
    assert left.error is None
    assert left.reason
    assert left.reason.startswith("left out by")


@pytest.mark.parametrize(
    ("kind", "section", "words"),
    [
        (PairRows, {"columns": {"assistant": "a"}}, "data.columns: assistant: a pair has two answers"),
        (PairRows, {"completion": "{a}"}, "data.completion: a pair has two answers"),
        (PairRows, {"columns": {"text": "a"}}, "data.columns: `text`: a key of rows for another objective"),
        (PairRows, {"columns": {"label": "a"}}, "data.columns: `label`: a key of rows for another objective"),
        (JudgedRows, {"columns": {"input_ids": "a"}}, "data.columns: `input_ids`: a key of rows for another objective"),
        (JudgedRows, {"response": "### Answer:"}, "data.response: it is for rows of text"),
        (RowEncoder, {"columns": {"chosen": "a"}}, "data.columns: `chosen`: a key of rows for another objective"),
    ],
)
def test_what_makes_no_sense_for_the_rows_is_refused_by_name(
    kind: type[RowEncoder], section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        outcomes(kind, PAIR, **section)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("kind", [PairRows, JudgedRows])
def test_equal_answers_are_dropped_as_one_row(kind: type[PairRows]) -> None:
    report = DataReport("a.jsonl")
    (made,) = outcomes(kind, {**PAIR, "rejected": "So."})
    report.count(made)
    assert made.reason == EQUAL
    assert (report.rows, report.kept, report.dropped[EQUAL]) == (1, 0, 1)
