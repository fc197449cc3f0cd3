"""Tokens shared by two texts, found by encoding a part, are those found by encoding both in full."""

from __future__ import annotations

import random
from typing import Any

import pytest

from chats.template_helpers import NAMES, template_tokenizer
from phinetune.chats.template import render, tokenize
from phinetune.chats.turn_bounds import shared_tokens
from phinetune.engine.examples import common_prefix

WORDS = ["Fine.", " lead", "trail ", "\n\nlines", "ünï🙂", "12", "<|", "|>", "<|end|>", "<|im_end|>", "<|user|>", "a"]


def random_chat(draw: random.Random) -> list[dict[str, Any]]:
    def text() -> str:
        return "".join(draw.choice(WORDS) for _ in range(draw.randint(0, 6)))

    roles = ["user", "assistant"] * draw.randint(1, 4)
    return [{"role": role, "content": text()} for role in roles]


def check(tokenizer: Any, seed: int) -> None:
    draw = random.Random(seed)
    chats = [random_chat(draw) for _ in range(60)]
    wholes = [render(tokenizer, chat) for chat in chats]
    bounds = [
        [render(tokenizer, chat[:i], reply=i % 2 == 1) for i in range(1, len(chat))] + [whole[: draw.randint(0, 40)]]
        for chat, whole in zip(chats, wholes, strict=True)
    ]
    ids = tokenize(tokenizer, wholes)
    wanted = [
        [common_prefix(one, tokens) for one in tokenize(tokenizer, texts)]
        for texts, tokens in zip(bounds, ids, strict=True)
    ]
    assert shared_tokens(tokenizer, wholes, ids, bounds) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_same_for_every_template(name: str) -> None:
    check(template_tokenizer(name), seed=0)


def test_they_are_the_same_for_the_real_tokenizer(phi3_tokenizer: Any) -> None:
    check(phi3_tokenizer, seed=1)


def test_a_template_without_control_tokens_encodes_the_whole_bound(phi3_tokenizer: Any) -> None:
    phi3_tokenizer.chat_template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{{ '### assistant: ' if add_generation_prompt else '' }}"
    )
    check(phi3_tokenizer, seed=2)


def test_what_is_shared_is_encoded_once(phi3_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "yes"}]
    whole, bound = render(phi3_tokenizer, chat), render(phi3_tokenizer, chat[:1], reply=True)
    asked: list[str] = []
    monkeypatch.setattr(
        "phinetune.chats.turn_bounds.tokenize", lambda t, texts: asked.extend(texts) or tokenize(t, texts)
    )
    ids = tokenize(phi3_tokenizer, [whole])
    assert shared_tokens(phi3_tokenizer, [whole], ids, [[bound]]) == [[len(tokenize(phi3_tokenizer, [bound])[0])]]
    assert asked == ["<|assistant|>\n"]
