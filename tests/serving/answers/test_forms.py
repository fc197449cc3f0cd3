"""What becomes of parameters within others: known ones are used or named in the log, others are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from phinetune.serving.answers.forms import ChatAsked, ResponseAsked
from phinetune.serving.answers.prompts import read_messages
from phinetune.serving.errors import ApiError

SCHEMA: dict[str, Any] = {"type": "object"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
RESPONSE: dict[str, Any] = {"model": "tiny", "input": "hi"}


def ignored(asked: ChatAsked | ResponseAsked, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The parameters that the log names."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        asked.check()
    return [record.getMessage().split()[1].rstrip(":") for record in caplog.records]


def test_what_is_within_others_and_changes_no_answer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    schema = {"name": "a", "description": "of a", "schema": SCHEMA, "strict": False}
    chat = ChatAsked(
        **CHAT,
        **{"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True}, "user": "me"},
        response_format={"type": "json_schema", "json_schema": schema},
    )
    assert ignored(chat, caplog) == [
        "user",
        "stream_options.include_obfuscation",
        "response_format.json_schema.description",
        "response_format.json_schema.strict",
    ]
    text = {"verbosity": "low", "format": {"type": "json_schema", **schema}}
    response = ResponseAsked(**RESPONSE, text=text)
    assert ignored(response, caplog) == ["text.verbosity", "text.format.description", "text.format.strict"]
    used = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    assert ignored(ChatAsked(**CHAT, response_format=used), caplog) == []
    assert ignored(ResponseAsked(**RESPONSE, text={"format": {"type": "text"}}), caplog) == []


def test_a_schema_that_its_type_would_drop_is_refused() -> None:
    for kind in ("text", "json_object"):
        form = {"type": kind, "json_schema": {"name": "a", "schema": SCHEMA}}
        with pytest.raises(ApiError) as error:
            ChatAsked(**CHAT, response_format=form).check()
        assert (error.value.code, error.value.param) == ("unknown_parameter", "response_format.json_schema")
        with pytest.raises(ApiError) as error:
            ResponseAsked(**RESPONSE, text={"format": {"type": kind, "schema": SCHEMA}}).check()
        assert (error.value.code, error.value.param) == ("unknown_parameter", "text.format.schema")


def test_a_key_of_a_message_that_the_api_does_not_have_is_refused() -> None:
    with pytest.raises(ApiError, match=r"Unknown parameter: 'messages\[1\].weight'\.") as error:
        read_messages([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 0}])
    assert (error.value.status, error.value.code) == (400, "unknown_parameter")


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    """As the clients' own objects print it, with the keys that are null, and with keys of other services that are."""
    sent = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None}
    assert read_messages([{**sent, "function_call": None, "reasoning_content": None}]) == [
        {"role": "assistant", "content": "yes"}
    ]
