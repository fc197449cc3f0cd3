"""The family's templates: renderings pinned byte for byte, masks exact for any conversation."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest

from chats.template_helpers import ENDS, NAMES, SNAPSHOTS, read_template, template_tokenizer
from helpers import SHARED
from phinetune.chats.control import control_tokens
from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.chats.template import render

WORDS = [
    "Fine.", " leading", "trailing ", "\n\nlines", "x\n", "ünï¢ode 🙂", "12", "<b>", "日本", "{{ a }}", "a\r\nb",
    "\t", "\u00a0", "\u3000", "\u200b", "e\u0301",
    "<|", "|>", "<|end|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|endoftext|>",
    "<|tool_call|>", "<s>",
]  # fmt: skip


def conversations(name: str) -> list[list[dict[str, Any]]]:
    more = SNAPSHOTS["tool_conversations"] if name == "phi-4-mini" else []
    return [*SNAPSHOTS["conversations"], *more]


def snapshots(name: str, count: int | None = None) -> list[Any]:
    """A parameter for each of a template's snapshots: the name, a conversation, and its renderings."""
    rendered = SNAPSHOTS["rendered"][name]
    assert len(rendered) == len(conversations(name)) >= 12
    pairs = list(enumerate(zip(conversations(name), rendered, strict=True)))[:count]
    return [pytest.param(name, chat, texts, id=f"{name}, conversation {i}") for i, (chat, texts) in pairs]


EACH_SNAPSHOT = [case for name in NAMES for case in snapshots(name)]
# In the twelfth conversation someone types control tokens.
WITHOUT_TYPED_TOKENS = [case for name in NAMES for case in snapshots(name, 11)]


@pytest.mark.parametrize(("name", "chat", "texts"), EACH_SNAPSHOT)
def test_each_template_renders_as_the_published_one(name: str, chat: Any, texts: dict[str, str]) -> None:
    tokenizer = template_tokenizer(name)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == texts["whole"]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == texts["prompt"]


@pytest.mark.parametrize(("name", "chat", "texts"), WITHOUT_TYPED_TOKENS)
def test_rendering_for_training_changes_nothing_where_no_control_token_is_typed(
    name: str, chat: Any, texts: dict[str, str]
) -> None:
    tokenizer = template_tokenizer(name)
    assert render(tokenizer, chat) == texts["whole"]
    assert render(tokenizer, chat, reply=True) == texts["prompt"]


def test_the_template_on_this_machine_is_the_pinned_one(phi3_tokenizer: Any) -> None:
    text = (SHARED / "phi3-tokenizer" / "chat_template.jinja").read_bytes()
    assert hashlib.sha256(text).hexdigest() == SNAPSHOTS["published_sha256"]["phi-3.5"]
    chats, wanted = SNAPSHOTS["conversations"], SNAPSHOTS["rendered"]["phi-3.5"]
    for key, reply in (("whole", False), ("prompt", True)):
        found = [phi3_tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=reply) for c in chats]
        assert found == [texts[key] for texts in wanted], key


def random_chat(draw: random.Random, name: str) -> list[dict[str, Any]]:
    def text() -> str:
        return "".join(draw.choice(WORDS) for _ in range(draw.randint(0, 5)))

    # The first template of Phi-3 has no system messages.
    chat = [{"role": "system", "content": text()}] if draw.random() < 0.4 and name != "phi-3-april-2024" else []
    if name == "phi-4-mini" and draw.random() < 0.3:
        chat = [{"role": "system", "content": text(), "tools": [call(text(), text())]}]
    for _ in range(draw.randint(1, 6)):
        chat += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        if draw.random() < 0.1:
            chat[-1]["train"] = False
        if name == "phi-4-mini" and draw.random() < 0.3:
            chat[-1]["tool_calls"] = [call(text(), text()) for _ in range(draw.randint(1, 2))]
            chat += [{"role": "tool", "content": text()}, {"role": "assistant", "content": text()}]
    return chat[:-1] if draw.random() < 0.2 and len(chat) > 3 else chat


def call(name: str, value: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{name}", "arguments": {"key": value}}}


def rendered_answers(name: str, chat: list[dict[str, Any]]) -> list[str]:
    """What the template writes for each answer after its header, less the white space that control tokens swallow."""
    wanted = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant" and message.get("train") is not False:
            left = message["content"].strip() if name == "phi-4" else message["content"].lstrip()
            if "tool_calls" in message:
                functions = [one["function"] for one in message["tool_calls"]]
                left += f"<|tool_call|>{json.dumps(functions, ensure_ascii=False)}<|/tool_call|>"
            closes = i == len(chat) - 1 and name not in ("phi-4", "phi-3-april-2024")
            wanted.append(left + ENDS[name] + ("<|endoftext|>" if closes else ""))
    return wanted


def control_tokens_of(name: str, chat: list[dict[str, Any]]) -> list[str]:
    """The tokens that the template itself puts where the model is trained, in order."""
    wanted = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant" and message.get("train") is not False:
            wanted += ["<|tool_call|>", "<|/tool_call|>"] if "tool_calls" in message else []
            closes = i == len(chat) - 1 and name not in ("phi-4", "phi-3-april-2024")
            wanted += [ENDS[name], *(["<|endoftext|>"] if closes else [])]
    return wanted


def check_masks(encoder: ChatEncoder, name: str, seed: int) -> None:
    draw = random.Random(seed)
    names = {i: token for token, i in control_tokens(encoder.tokenizer).ids.items()}
    for _ in range(200):
        chat = random_chat(draw, name)
        assert trained_spans(encoder, chat) == rendered_answers(name, chat), chat
        labels = encoder.encode([chat])[0].labels
        assert [names[i] for i in labels if i in names] == control_tokens_of(name, chat), chat


def trained_spans(encoder: ChatEncoder, chat: list[dict[str, Any]]) -> list[str]:
    row = encoder.encode([chat])[0]
    spans: list[list[int]] = []
    for i, label in enumerate(row.labels):
        if label != -100:
            assert label == row.input_ids[i]
            if i and row.labels[i - 1] != -100:
                spans[-1].append(label)
            else:
                spans.append([label])
    return [str(encoder.tokenizer.decode(span)) for span in spans]


@pytest.mark.parametrize("name", NAMES)
def test_trained_tokens_are_what_the_template_renders_for_the_answers(name: str) -> None:
    check_masks(make_encoder(template_tokenizer(name)), name, 7)


@pytest.mark.parametrize("name", ["phi-3", "phi-3-april-2024", "phi-3.5"])
def test_trained_tokens_of_the_real_tokenizer_too(phi3_tokenizer: Any, name: str) -> None:
    phi3_tokenizer.chat_template = read_template(name)
    check_masks(make_encoder(phi3_tokenizer), name, 8)
