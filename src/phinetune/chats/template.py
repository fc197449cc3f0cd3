"""Renders chats with a checkpoint's chat template, and finds out by rendering what the template does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from phinetune.chats.control import THOUGHTS, ControlTokens, control_tokens
from phinetune.chats.template_rendering import apply_template
from phinetune.chats.tools import ToolStyle, lay_out, tool_style
from phinetune.engine.examples import common_prefix

# A message has the keys `role` and `content`, which is text. It may also have: `tool_calls`, in an assistant's turn;
# `tools`, in a system message that comes first; `train`, which is false for a turn without loss; and further texts of
# its row under their own keys, such as `name`, `tool_call_id` or `reasoning_content`.
Message = dict[str, Any]

_PROBE = "zqx"  # letters that no template writes itself


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, reply: bool = False) -> str:
    """The chat as text for `tokenize`.

    Control tokens inside the messages are masked, see `phinetune.chats.control`.

    Args:
        reply: whether the text ends with the header of the assistant's next turn.
    """
    return render_all(tokenizer, [messages], reply=reply)[0]


def render_all(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], *, reply: bool = False
) -> list[str]:
    """`render` for many chats. The chats without tools are rendered in one call."""
    control = control_tokens(tokenizer)
    ready = [_for_template(control, chat) for chat in chats]
    with_tools = {i for i, chat in enumerate(ready) if any("tools" in m or "tool_calls" in m for m in chat)}
    together = [chat for i, chat in enumerate(ready) if i not in with_tools]
    texts = apply_template(tokenizer, together, reply=reply) if together else []
    for i in sorted(with_tools):
        chat, tools = lay_out(ready[i], style_of(tokenizer))
        texts[i:i] = apply_template(tokenizer, [chat], tools=tools, reply=reply)
    return texts


def _for_template(control: ControlTokens, messages: Sequence[Message]) -> list[Message]:
    """The messages without the key `train`, which templates do not know, and with typed control tokens masked."""
    chat = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    if any(typed_tokens(control, message) for message in chat):
        return [_masked(control, message) for message in chat]
    return chat


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of rendered chats. No special tokens are added, as a template writes them itself."""
    masked = [i for i, text in enumerate(texts) if ControlTokens.is_masked(text)]
    unmasked = [text for text in texts if not ControlTokens.is_masked(text)]
    ids = iter(_unmasked_ids(tokenizer, unmasked) if unmasked else [])
    twin_ids = iter(control_tokens(tokenizer).encode([texts[i] for i in masked]) if masked else [])
    chosen = set(masked)
    return [list(next(twin_ids if i in chosen else ids)) for i in range(len(texts))]


def _unmasked_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids that the tokenizer itself gives."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found
    # transformers sets these three at each of its own calls. `encode_batch_fast` computes no offsets, which takes a
    # fifth less time.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def typed_tokens(control: ControlTokens, message: Message) -> list[str]:
    """The control tokens inside a message, which the tokenizer would take for the template's own."""
    spared = THOUGHTS if message["role"] == "assistant" else frozenset()
    found = control.find(message["content"])
    for key, value in message.items():
        if key not in ("role", "content", "train"):
            found += [token for text in _texts(value) for token in control.find(text)]
    return [token for token in found if token not in spared]


def _texts(value: Any) -> list[str]:
    """All texts in a value of lists and dictionaries, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _masked(control: ControlTokens, message: Message) -> Message:
    """The message with stand-ins for typed control tokens. In answers, `<think>` and `</think>` stay."""
    spared = THOUGHTS if message["role"] == "assistant" else frozenset()
    return {key: value if key == "role" else control.mask(value, spared) for key, value in message.items()}


_styles: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ToolStyle]] = WeakKeyDictionary()


def style_of(tokenizer: PreTrainedTokenizerBase) -> ToolStyle:
    """How the template takes tools and tool calls. Each template is examined once."""
    known = _styles.get(tokenizer)
    if known is None or known[0] != tokenizer.chat_template:
        known = _styles[tokenizer] = (tokenizer.chat_template, tool_style(tokenizer))
    return known[1]


def renders_role(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Whether the template renders messages of a role. Some templates drop them without a warning."""
    other = {"role": "user", "content": "hello"}
    probe = {"role": role, "content": _PROBE}
    chat = [probe, other] if role == "system" else [other, probe]
    try:
        return _PROBE in render(tokenizer, chat)
    except Exception:  # Jinja and a template's author can raise errors of any class
        return False


def renders_key(tokenizer: PreTrainedTokenizerBase, role: str, key: str) -> bool:
    """Whether the template writes what the last turn of a role has in a key, for example an answer's reasoning."""
    turn = {"role": role, "content": "hello", key: _PROBE}
    before = [] if role in ("system", "user") else [{"role": "user", "content": "hello"}]
    after = [{"role": "user", "content": "hello"}] if role == "system" else []
    try:
        return _PROBE in render(tokenizer, [*before, turn, *after])
    except Exception:  # Jinja and a template's author can raise errors of any class
        return False


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the special tokens that the template writes after the content of an assistant's last turn."""
    question = {"role": "user", "content": "hello"}
    header, whole = (
        render(tokenizer, [question], reply=True),
        render(tokenizer, [question, {"role": "assistant", "content": _PROBE}]),
    )
    header_ids, whole_ids = tokenize(tokenizer, [header, whole])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return list(dict.fromkeys(i for i in whole_ids[common_prefix(header_ids, whole_ids) :] if i in special))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation stops: the template's end-of-turn tokens, and the tokenizer's end-of-text token."""
    ids = end_of_turn_ids(tokenizer)
    eos = tokenizer.eos_token_id
    return ids if eos is None or eos in ids else [*ids, eos]
