"""What the page tells of a file and of a job before it trains; all by one process beside the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from helpers import chat
from phinetune.api.data import check, preview
from phinetune.config.model import ModelSection
from phinetune.serving.page.splitting import split_file
from phinetune.serving.state import ServerState
from serving.page.page_helpers import Visitor
from serving.serving_helpers import ask, keep_file, threaded

PAIR = {
    "input": {"messages": [{"role": "user", "content": "Say <script>it</script>"}]},
    "preferred_output": [{"role": "assistant", "content": "It is."}],
    "non_preferred_output": [{"role": "assistant", "content": "No."}],
}
Served = tuple[ServerState, OpenAI]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with threaded(tmp_path_factory.mktemp("served")) as made:
        yield made


@pytest.fixture(scope="module")
def file(served: Served, rows: list[dict[str, Any]]) -> str:
    extra = chat("Who?\nI.", "Alice, in two\nlines")
    return served[1].files.create(file=("rows.jsonl", lines([*rows, rows[0], extra])), purpose="fine-tune").id


def test_a_check_and_its_rows_are_those_of_the_verbs(served: Served, file: str) -> None:
    state, client = served
    path = state.folder / "files" / f"{file}.jsonl"
    section = state.settings.models["tiny"]
    status, told, _ = ask(client, "GET", f"/phinetune/files/{file}/check")
    wanted = check(str(path), model=section.model_dump()).report.to_dict()
    assert status == 200
    for key in ("rows", "kept", "tokens", "trainable_tokens", "longest", "turns", "spoiled"):
        assert told[key] == wanted[key], key
    assert {one["kind"]: one["count"] for one in told["findings"]} == {
        one["kind"]: one["count"] for one in wanted["findings"]
    }
    assert "duplicate" in {one["kind"] for one in told["findings"]}
    assert str(path) not in json.dumps(told)

    status, shown, _ = ask(client, "GET", f"/phinetune/files/{file}/rows?first=12&count=2")
    assert (status, shown["first"], shown["total"]) == (200, 12, 14)
    rows = preview(str(path), rows=14, model=section.model_dump())[12:]
    assert [row["line"] for row in shown["data"]] == [13, 14]
    for row, one in zip(shown["data"], rows, strict=True):
        assert (row["tokens"], row["trainable_tokens"]) == (one.tokens, one.trainable)
        pieces = [[(p["text"], p["special"], p["trained"]) for p in turn["pieces"]] for turn in row["turns"]]
        assert pieces == [[tuple(piece) for piece in turn.pieces] for turn in one.turns]
    assert ask(client, "GET", f"/phinetune/files/{file}/rows?first=14")[1]["data"] == []


def test_the_pieces_of_the_page_show_it_in_both_languages(served: Served, file: str) -> None:
    for language, words in (("en", ("rows that occur twice", "user")), ("zh", ("重复的条目", "用户"))):
        visitor = Visitor(served[1], language)
        checked = visitor.see(f"/phinetune/parts/files/{file}/check?model=tiny")[1]["text"]
        shown = visitor.see(f"/phinetune/parts/files/{file}/rows?first=13&count=3")[1]["text"]
        assert words[0] in checked
        assert words[1] in shown
        assert "↵" in shown
        assert 'class="tok trained"' in shown


def test_pairs_are_shown_with_both_answers_and_nothing_in_them_is_html(served: Served) -> None:
    pairs = served[1].files.create(file=("pairs.jsonl", lines([PAIR, PAIR])), purpose="fine-tune").id
    shown = ask(served[1], "GET", f"/phinetune/files/{pairs}/rows?count=1")[1]
    assert [turn["role"] for turn in shown["data"][0]["turns"]] == ["user", "chosen", "rejected"]
    text = Visitor(served[1]).see(f"/phinetune/parts/files/{pairs}/rows")[1]["text"]
    assert "better answer" in text
    assert "<script>" not in text


def test_a_plan_says_what_a_job_takes_and_makes_none(served: Served, file: str) -> None:
    body = {"model": "tiny", "training_file": file, "method": {"type": "supervised", "supervised": {
        "hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2}}}}  # fmt: skip
    status, told, _ = ask(served[1], "POST", "/phinetune/plans", body)
    assert status == 200
    assert told["fits"]
    assert told["memory"] > 0
    assert told["seconds"] > 0
    assert told["hyperparameters"]["n_epochs"] == 2
    assert told["hyperparameters"]["learning_rate_multiplier"] == 2
    assert told["steps"] == 2 * -(-14 // told["hyperparameters"]["batch_size"])
    assert any(one["key"].endswith("learning_rate") and one["why"] for one in told["settings"])
    assert served[1].fine_tuning.jobs.list().data == []
    text = Visitor(served[1]).do("POST", "/phinetune/parts/plan", body)[1]["text"]
    assert "✓ It fits." in text
    for more, code in (({"model": "gpt"}, 404), ({"training_file": "file-none"}, 400), ({"seed": -1}, 400)):
        assert ask(served[1], "POST", "/phinetune/plans", {**body, **more})[0] == code


def test_a_base_that_is_not_there_is_no_fault_of_a_file(tmp_path: Path) -> None:
    with threaded(tmp_path / "server", models={"mini": ModelSection(path=str(tmp_path / "mini"))}) as (state, client):
        file = keep_file(state, "file-chat")
        for path, body in ((f"files/{file}/check", None), ("plans", {"model": "mini", "training_file": file})):
            status, tree, _ = ask(client, "POST" if body else "GET", f"/phinetune/{path}", body)
            assert (status, tree["error"]["code"]) == (503, "cant_look")


def test_rows_are_kept_aside_the_same_way_each_time(served: Served, file: str) -> None:
    state, client = served
    status, told, _ = ask(client, "POST", f"/phinetune/files/{file}/split", {"held_out": 0.25})
    assert status == 200
    texts = [client.files.content(told[key]).text.splitlines() for key in ("training_file", "validation_file")]
    whole = client.files.content(file).text.splitlines()
    assert sorted(texts[0] + texts[1]) == sorted(whole)
    assert not set(texts[0]) & set(texts[1])  # the row that is there twice is on one side
    assert len(set(texts[1])) == round(0.25 * len(set(whole)))
    again = split_file(state, file, 0.25)
    assert client.files.content(again.validation_file).text.splitlines() == texts[1]
    assert client.files.retrieve(told["validation_file"]).filename == "rows-held-out.jsonl"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/phinetune/files/file-none/check", None, 404),
        ("GET", "/phinetune/files/..%2f..%2fserver.sqlite/rows", None, 404),
        ("GET", "/phinetune/files/{file}/rows?count=51", None, 400),
        ("GET", "/phinetune/files/{file}/rows?first=-1", None, 400),
        ("GET", "/phinetune/files/{file}/check?model=/etc/passwd", None, 404),
        ("POST", "/phinetune/files/{file}/split", {"held_out": 1}, 400),
        ("POST", "/phinetune/files/{file}/split", {"share": 0.1}, 400),
    ],
)
def test_mistakes_have_the_apis_form(
    served: Served, file: str, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    found, tree, _ = ask(served[1], method, path.format(file=file), body)
    assert found == status
    assert tree["error"]["message"]


def test_a_file_of_equal_rows_has_nothing_to_keep_aside(served: Served) -> None:
    equal = served[1].files.create(file=("equal.jsonl", lines([chat("a", "b")] * 2)), purpose="fine-tune").id
    status, tree, _ = ask(served[1], "POST", f"/phinetune/files/{equal}/split", {})
    assert status == 400
    assert "equal ones" in tree["error"]["message"]
    assert Path(served[0].folder / "files" / f"{equal}.jsonl").is_file()
