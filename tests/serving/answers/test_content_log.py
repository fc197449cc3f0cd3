"""What chats say stands in the log where the server was started with `--log-contents`, and nowhere else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.answers.served import serving

SECRET = "sk-" + "a" * 24
SAID = f"my zebra\nis \x1b[31m called Zoë {SECRET}"
SHOWN = r"my zebra\nis \u001b[31m called Zoë (secret)"  # one line, without the key
LETTERS = {"80": 100}  # makes the model write M


def read(stream: Any) -> Any:
    """The first event of a stream that is read to its end."""
    first, *_ = stream
    return first


def ask_all(client: openai.OpenAI) -> list[str]:
    """Each endpoint, whole and streamed; the ids of their answers."""
    messages: list[Any] = [{"role": "user", "content": SAID}]
    chat: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 4, "logit_bias": LETTERS}
    text: dict[str, Any] = {"model": "tiny", "prompt": SAID, "max_tokens": 4, "logit_bias": LETTERS}
    # What /v1/responses takes has no bias; drawn freely, the model may end at once and say nothing.
    response: dict[str, Any] = {"model": "tiny", "input": SAID, "max_output_tokens": 4, "temperature": 0}
    whole = [
        client.chat.completions.create(**chat, n=2).id,
        client.completions.create(**text).id,
        client.responses.create(**response, instructions="be brief").id,
    ]
    streamed = [
        read(client.chat.completions.create(**chat, stream=True)).id,
        read(client.completions.create(**text, stream=True)).id,
        read(client.responses.create(**response, stream=True)).response.id,
    ]
    return [*whole, *streamed]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "phinetune"):
        yield caplog


def lines(log: pytest.LogCaptureFixture, words: str) -> list[str]:
    """The server's lines with these words; the client in this process has a log of its own."""
    own = [record.getMessage() for record in log.records if record.name.startswith("phinetune")]
    assert own
    return [line for line in own if words in line]


def test_a_line_for_each_request_and_one_for_its_answers(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path, adapter=False, log_contents=True) as served:
        ids = ask_all(served.client)
    asked = lines(log, "zebra")
    assert [line.split(" asks tiny: ")[0] for line in asked] == ids
    assert asked[0] == f'{ids[0]} asks tiny: [{{"role": "user", "content": "{SHOWN}"}}]'
    assert asked[1] == f'{ids[1]} asks tiny: "{SHOWN}"'
    assert asked[2] == f'{ids[2]} asks tiny: {{"instructions": "be brief", "input": "{SHOWN}"}}'
    answers = [line.split(" answers: ") for line in lines(log, " answers: ")]
    assert [id for id, _ in answers] == ids
    texts = [json.loads(text) for _, text in answers]
    assert [texts[i] for i in (0, 1, 3, 4)] == [["MMMM"] * 2, ["MMMM"], ["MMMM"], ["MMMM"]]
    assert all(len(text) == 1 and text[0] for text in (texts[2], texts[5]))
    assert not any("\n" in line for line in [*asked, *lines(log, " answers: ")])


def test_nothing_of_it_without(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path, adapter=False) as served:
        ask_all(served.client)
    assert lines(log, "zebra") == lines(log, "MMMM") == lines(log, " answers: ") == []
