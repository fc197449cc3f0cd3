"""Which column is what, guessed from the names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from phinetune.config.run import make_config
from phinetune.data.read.propose import propose


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        (
            {"question": "q", "answer": "a", "context": "c", "topic": "t"},
            "user=question assistant=answer system=context tag=topic",
            None,
        ),
        ({"src": "q", "tgt": "a"}, "user=src assistant=tgt", None),
        (
            {"id": "x", "Customer Question": "q", "agentResponse": "a"},
            "user=Customer Question assistant=agentResponse",
            None,
        ),
        ({"front": "q", "back": "a"}, "user=front assistant=back", None),
        ({"sql": "a", "question": "q", "schema": "s"}, "user=question assistant=sql system=schema", None),
        ({"instruction": "i", "input": "x", "response": "r"}, "assistant=response", "{instruction}\n{input}"),
        ({"body": "words"}, "text=body", None),
        ({"n": 1}, "", None),
    ],
)
def test_the_names_tell(row: dict[str, Any], columns: str, prompt: str | None) -> None:
    made = propose([row])
    assert made.columns == dict(
        pair.split("=") for pair in columns.replace("Customer Question", "Customer_Question").split() if pair
    ) | ({"user": "Customer Question"} if "Customer Question" in row else {})
    assert (made.prompt, made.guessed and bool(made.columns)) == (prompt, False)
    data = yaml.safe_load("data:\n  train: x\n" + "\n".join(made.yaml()))["data"]
    section = make_config({"data": data}).data
    assert section.prompt == prompt
    assert {**section.columns, **({"tag": section.tag} if section.tag else {})} == made.columns


def test_names_that_tell_nothing_give_a_guess_that_says_so() -> None:
    made = propose([{"id": 1, "Alpha: x": "words", "yes": "more"}])
    assert (made.columns, made.guessed) == ({"user": "Alpha: x", "assistant": "yes"}, True)
    assert made.line() == 'columns: {user: "Alpha: x", assistant: "yes"}'
    assert "this is a guess" in made.advice("f.csv")[0]


def test_a_known_form_needs_no_proposal() -> None:
    assert propose([{"prompt": "a", "completion": "b", "question": "c"}]).form == "prompt_completion"
