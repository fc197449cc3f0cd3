"""What a template does is found out by rendering with it."""

from __future__ import annotations

from typing import Any

import pytest

from phinetune.chats.control import control_tokens
from phinetune.chats.template import end_of_turn_ids, render, renders_key, renders_role, stop_ids, typed_tokens
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.engine.examples import common_prefix


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


def test_phi_3_ends_a_turn_with_end_and_the_text_with_endoftext(phi3_tokenizer: Any) -> None:
    assert end_of_turn_ids(phi3_tokenizer) == [32007, 32000]
    assert end_of_turn_ids(byte_tokenizer()) == [32007, 32000]


def test_the_tokenizers_end_token_stops_too() -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    assert stop_ids(tokenizer) == [262, 259]


def test_roles_that_are_dropped_or_refused_are_not_rendered() -> None:
    tokenizer = byte_tokenizer(300)
    assert renders_role(tokenizer, "system")
    assert not renders_role(tokenizer, "tool")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert not renders_role(tokenizer, "system")


NAMING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'user' and m.name %}{{ m.name + ': ' }}{% endif %}"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}{{ m.reasoning_content }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("role", "key", "wanted"),
    [
        ("user", "name", True),
        ("assistant", "name", False),
        ("system", "name", False),
        ("assistant", "reasoning_content", True),
        ("user", "reasoning_content", False),
        ("assistant", "thinking", True),  # another name for it, which transformers knows
        ("assistant", "thoughts", False),
    ],
)
def test_a_key_is_read_where_its_text_is_rendered(role: str, key: str, wanted: bool) -> None:
    tokenizer = byte_tokenizer(300)
    assert not renders_key(tokenizer, role, key)
    tokenizer.chat_template = NAMING
    assert renders_key(tokenizer, role, key) == wanted
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert not renders_key(tokenizer, role, key)


def test_control_tokens_in_further_texts_are_letters() -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = NAMING
    message = {"role": "user", "name": "<|end|>", "content": "Hi"}
    assert typed_tokens(control_tokens(tokenizer), message) == ["<|end|>"]
    assert render(tokenizer, [message]).count("<|end|>") == 1


def test_typed_tokens_come_in_the_order_of_the_message() -> None:
    tokens = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|endoftext|>"] * 2
    message = {"role": "user", "content": "", **{f"k{i}": token for i, token in enumerate(tokens)}}
    assert typed_tokens(control_tokens(byte_tokenizer()), message) == tokens
