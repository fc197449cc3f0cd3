"""Talking: turns are remembered, streams equal whole answers, commands do what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phinetune.checkpoints import untouched
from phinetune.checkpoints.opened import open_model
from phinetune.engine.generate import Sampling
from phinetune.errors import ConfigError
from phinetune.screen.chat_loop import hold_chat
from phinetune.talk.conversation import Conversation


@pytest.fixture
def conversation(tiny_run: Path) -> Conversation:
    return Conversation(open_model(tiny_run), Sampling(), max_new_tokens=8)


def test_a_stream_is_the_whole_answer_in_pieces(conversation: Conversation) -> None:
    whole = conversation.answer("How many?").text
    conversation.reset()
    assert "".join(conversation.stream("How many?")) == whole
    assert conversation.turns == [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": whole},
    ]


def test_the_next_prompt_holds_the_turns_before(conversation: Conversation) -> None:
    conversation.system = "Count."
    answer = conversation.answer("How many?").text
    text = conversation.opened.loaded.tokenizer.decode(conversation.prompt_ids("Sure?"))
    assert text == (
        f"<|system|>Count.<|end|><|user|>How many?<|end|><|assistant|>{answer}<|end|><|user|>Sure?<|end|><|assistant|>"
    )


def test_the_base_answers_without_the_adapter(conversation: Conversation) -> None:
    tuned = conversation.answer("How many?").text
    conversation.reset()
    conversation.with_base = True
    base = conversation.answer("How many?").text
    assert base != tuned
    untuned = Conversation(open_model(conversation.opened.config.model.path), Sampling(), max_new_tokens=8)
    assert untuned.answer("How many?").text == base


def test_a_base_that_the_adapter_changed_is_loaded_once_for_all_messages(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation.with_base = True
    wanted = [conversation.answer(text).text for text in ("How many?", "Sure?")]
    conversation.reset()
    loads: list[Any] = []
    load = untouched.load_base
    monkeypatch.setattr(untouched, "load_base", lambda *args, **more: loads.append(args) or load(*args, **more))
    monkeypatch.setattr(untouched, "moves_the_base", lambda peft: True)
    assert [conversation.answer(text).text for text in ("How many?", "Sure?")] == wanted
    assert len(loads) == 1


def test_a_stream_left_early_stops_generating(conversation: Conversation) -> None:
    conversation.max_new_tokens = 100_000
    stream = conversation.stream("How many?")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert conversation.turns == []


def test_an_error_while_generating_comes_back(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(conversation.opened.model, "generate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(conversation.stream("How many?"))


def test_the_oldest_turns_leave_a_conversation_that_outgrows_the_model(
    conversation: Conversation, caplog: pytest.LogCaptureFixture
) -> None:
    positions = 100
    conversation.opened.model.config.max_position_embeddings = positions
    conversation.system = "Count."
    for i in range(6):
        "".join(conversation.stream(f"{i}, how many?"))
        assert len(conversation.prompt_ids("?")) + conversation.max_new_tokens <= positions
    assert "5, how many?" in str(conversation.turns)
    assert "0, how many?" not in str(conversation.turns)
    assert conversation.opened.loaded.tokenizer.decode(conversation.prompt_ids("?")).startswith("<|system|>Count.")
    assert "has outgrown the model's 100 positions: its oldest 2 turns were left out" in caplog.text


def test_turns_stay_where_an_answer_has_a_quarter_of_the_positions(conversation: Conversation) -> None:
    conversation.opened.model.config.max_position_embeddings = 100
    conversation.max_new_tokens = 1000
    conversation.turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    conversation.prompt_ids("How many?")
    assert len(conversation.turns) == 2


def test_an_answer_and_a_stream_end_with_the_models_positions(conversation: Conversation) -> None:
    conversation.with_base = True
    conversation.opened.loaded.model.generation_config.eos_token_id = None  # nothing else ends an answer
    whole = conversation.answer("How many?").text
    conversation.reset()
    conversation.opened.model.config.max_position_embeddings = len(conversation.prompt_ids("How many?")) + 3
    cut = conversation.answer("How many?")
    assert (cut.tokens, cut.text != whole) == (3, True)
    conversation.reset()
    assert "".join(conversation.stream("How many?")) == cut.text


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on(
    conversation: Conversation, console: Console
) -> None:
    conversation.opened.model.config.max_position_embeddings = 60
    long = "How many? " * 9
    conversation.turns = before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(ConfigError, match="tokens, and the model has positions for 60, answer included; shorten it"):
        conversation.answer(long)
    assert conversation.turns == before
    conversation.reset()
    shown = talk(conversation, console, long, "Hi")
    assert "the model has positions for 60" in shown
    assert [turn["content"] for turn in conversation.turns[::2]] == ["Hi"]


def talk(conversation: Conversation, console: Console, *lines: str) -> str:
    script: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(script)
        except StopIteration:
            raise EOFError from None

    hold_chat(conversation, console, read)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_new_conversation_has_nothing_to_see(conversation: Conversation, console: Console) -> None:
    assert "now talking to the base model\n" in talk(conversation, console, "/base")


def test_commands(conversation: Conversation, console: Console) -> None:
    shown = talk(conversation, console, "Hi", "/base", "Hi", "/base", "/reset", "/nonsense", "/help", "", "/exit", "Hi")
    assert shown.count("tuned> ") == 1
    assert shown.count("base> ") == 1
    assert "now talking to the base model; it sees what was said so far, and /reset starts anew" in shown
    assert "now talking to the tuned model" in shown
    assert "no such command: /nonsense" in shown
    assert conversation.turns == []


def test_the_end_of_input_leaves(conversation: Conversation, console: Console) -> None:
    talk(conversation, console, "Hi")
    assert len(conversation.turns) == 2
