"""What a checkpoint's chat template does, found out by rendering with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_PROBE = "zqx"  # letters that no template writes by itself


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, reply: bool = False) -> str:
    """The chat as text; with `reply`, up to and with the header of the assistant's next turn."""
    text: Any = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=reply)
    return str(text)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered chats. A template writes its special tokens itself, so none is added."""
    if not texts:
        return []
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def renders_role(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Whether the template puts the words of a `role` message into the text; some drop them in silence."""
    other = {"role": "user", "content": "hello"}
    probe = {"role": role, "content": _PROBE}
    chat = [probe, other] if role == "system" else [other, probe]
    try:
        return _PROBE in render(tokenizer, chat)
    except Exception:  # a template refuses by raising whatever Jinja or its author chose
        return False


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the template puts after the content of an assistant's last turn."""
    question = {"role": "user", "content": "hello"}
    header, whole = (
        render(tokenizer, [question], reply=True),
        render(tokenizer, [question, {"role": "assistant", "content": _PROBE}]),
    )
    header_ids, whole_ids = tokenize(tokenizer, [header, whole])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return list(dict.fromkeys(i for i in whole_ids[common_prefix(header_ids, whole_ids) :] if i in special))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation stops: the template's ends of turn and the tokenizer's end token."""
    ids = end_of_turn_ids(tokenizer)
    eos = tokenizer.eos_token_id
    return ids if eos is None or eos in ids else [*ids, eos]
