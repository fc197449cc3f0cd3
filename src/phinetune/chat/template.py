"""What a checkpoint's chat template does, found out by rendering with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from phinetune.chat.control import THOUGHTS, ControlTokens, control_tokens
from phinetune.chat.tools import ToolStyle, lay_out, tool_style

# `role` and `content` (text); where there is more: `tool_calls` on an assistant's turn, `tools` on a system message
# that stands first, `train` (false: no loss on this turn), `name` and `tool_call_id` on a tool's turn.
Message = dict[str, Any]

_PROBE = "zqx"  # letters that no template writes by itself


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, reply: bool = False) -> str:
    """The chat as text for `tokenize`; with `reply`, up to and with the header of the assistant's next turn.

    Control tokens that stand in the messages themselves are masked (`phinetune.chat.control`).
    """
    return render_all(tokenizer, [messages], reply=reply)[0]


def render_all(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], *, reply: bool = False
) -> list[str]:
    """`render` for many chats, those without tools in one call."""
    control = control_tokens(tokenizer)
    ready = [_for_template(control, chat) for chat in chats]
    with_tools = {i for i, chat in enumerate(ready) if any("tools" in m or "tool_calls" in m for m in chat)}
    together = [chat for i, chat in enumerate(ready) if i not in with_tools]
    texts: list[Any] = []
    if together:
        texts += tokenizer.apply_chat_template(together, tokenize=False, add_generation_prompt=reply)
    for i in sorted(with_tools):
        chat, tools = lay_out(ready[i], style_of(tokenizer))
        text: Any = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=reply)
        texts.insert(i, text)
    return [str(text) for text in texts]


def _for_template(control: ControlTokens, messages: Sequence[Message]) -> list[Message]:
    """The messages without our own keys, typed control tokens masked."""
    chat = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    if any(typed_tokens(control, message) for message in chat):
        return [_masked(control, message) for message in chat]
    return chat


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered chats. A template writes its special tokens itself, so none is added."""
    masked = [i for i, text in enumerate(texts) if ControlTokens.is_masked(text)]
    plain = [text for text in texts if not ControlTokens.is_masked(text)]
    ids = iter(_plain_ids(tokenizer, plain) if plain else [])
    twin_ids = iter(control_tokens(tokenizer).encode([texts[i] for i in masked]) if masked else [])
    chosen = set(masked)
    return [list(next(twin_ids if i in chosen else ids)) for i in range(len(texts))]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found
    # transformers sets these anew at every call of its own. Without offsets a call takes a fifth less time.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def typed_tokens(control: ControlTokens, message: Message) -> list[str]:
    """The control tokens that stand in a message, where the tokenizer would take them for the template's."""
    spared = THOUGHTS if message["role"] == "assistant" else frozenset()
    found = control.find(message["content"])
    for key in ("tools", "tool_calls", "name", "tool_call_id"):
        if key in message:
            found += [token for text in _texts(message[key]) for token in control.find(text)]
    return [token for token in found if token not in spared]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _masked(control: ControlTokens, message: Message) -> Message:
    spared = THOUGHTS if message["role"] == "assistant" else frozenset()
    return {key: value if key == "role" else control.mask(value, spared) for key, value in message.items()}


_styles: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ToolStyle]] = WeakKeyDictionary()


def style_of(tokenizer: PreTrainedTokenizerBase) -> ToolStyle:
    """How the template takes tools and calls; probed once for each template."""
    known = _styles.get(tokenizer)
    if known is None or known[0] != tokenizer.chat_template:
        known = _styles[tokenizer] = (tokenizer.chat_template, tool_style(tokenizer))
    return known[1]


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
