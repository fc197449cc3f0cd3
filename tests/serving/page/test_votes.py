"""Votes are kept as given, and become a preference file that a dpo job takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from phinetune.serving.state import ServerState
from serving.page.page_helpers import Visitor
from serving.serving_helpers import ask, threaded

Served = tuple[ServerState, OpenAI]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with threaded(tmp_path_factory.mktemp("served")) as made:
        yield made


def a_vote(question: str = "Which?", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    sides = {"preferred": {"model": "ft:b", "content": "Das da – 这个."}, "other": {"model": "b", "content": "That."}}
    return {"messages": messages, **sides, **more}


def test_votes_become_a_file_that_dpo_takes(served: Served) -> None:
    client = served[1]
    assert ask(client, "POST", "/phinetune/votes/file")[0] == 400
    visitor = Visitor(client)
    kept = [visitor.do("POST", "/phinetune/votes", a_vote(f"Which {i}?"))[1] for i in range(3)]
    alike = visitor.do("POST", "/phinetune/votes", a_vote("Alike?", equal=True))[1]
    listed = ask(client, "GET", "/phinetune/votes?limit=2")[1]
    assert [one["id"] for one in listed["data"]] == [alike["id"], kept[2]["id"]]
    assert listed["has_more"]
    older = ask(client, "GET", f"/phinetune/votes?after={listed['last_id']}")[1]
    assert [one["messages"][-1]["content"] for one in older["data"]] == ["Which 1?", "Which 0?"]
    status, made, _ = ask(client, "POST", "/phinetune/votes/file")
    assert (status, made["rows"], made["equal"]) == (200, 3, 1)
    rows = [json.loads(line) for line in client.files.content(made["file"]).text.splitlines()]
    assert rows[0] == {
        "input": {"messages": a_vote("Which 0?")["messages"]},
        "preferred_output": [{"role": "assistant", "content": "Das da – 这个."}],
        "non_preferred_output": [{"role": "assistant", "content": "That."}],
    }
    text, headers = visitor.download("/phinetune/votes/rows")
    assert text == client.files.content(made["file"]).read()
    assert "attachment" in headers["content-disposition"]
    job = client.fine_tuning.jobs.create(model="tiny", training_file=made["file"], method={"type": "dpo"})
    assert job.status == "validating_files"
    shown = visitor.see("/phinetune/parts/votes")[1]["text"]
    assert "3 votes prefer an answer, 1 find both alike" in shown
    assert visitor.do("DELETE", f"/phinetune/votes/{alike['id']}")[1]["deleted"]
    assert visitor.do("DELETE", f"/phinetune/votes/{alike['id']}")[0] == 404
    assert visitor.do("DELETE", "/phinetune/votes")[0] == 200
    assert ask(client, "GET", "/phinetune/votes")[1]["data"] == []
    assert client.files.retrieve(made["file"]).filename == "votes.jsonl"


@pytest.mark.parametrize(
    "more",
    [
        {"other": {"model": "b", "content": "Das da – 这个."}},
        {"other": {"model": "b", "content": ""}},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "Hello."}]},
        {"messages": [{"role": "robot", "content": "Hello."}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "x" * 200_001}]},
        {"winner": "left"},
    ],
)
def test_what_is_no_vote_is_refused(served: Served, more: dict[str, Any]) -> None:
    status, tree, _ = ask(served[1], "POST", "/phinetune/votes", a_vote(**more))
    assert status == 400
    assert tree["error"]["message"]
    assert ask(served[1], "GET", "/phinetune/votes")[1]["data"] == []
