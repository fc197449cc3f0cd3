"""What a template does is found out by rendering with it."""

from __future__ import annotations

from typing import Any

from phinetune.chats.template import end_of_turn_ids, renders_role, stop_ids
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
