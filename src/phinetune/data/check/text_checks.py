"""Checks a chat's turns, and the letters in its texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from phinetune.chats.control import control_tokens
from phinetune.chats.encoder import ChatEncoder
from phinetune.chats.template import Message, typed_tokens
from phinetune.data.read.audit import is_rendered

# Hidden letters: control characters, except tabs and line ends; marks that change the reading direction; a byte order
# mark inside a text; code points that are not characters; tags (an invisible alphabet), except those of a flag.
HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufdd0-\ufdef\ufffe\uffff]"
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"
)
LOST = "\ufffd"  # the replacement character: a letter that could not be decoded earlier
# The tokens by which common chat templates mark turns.
MARKUP = re.compile(
    r"<\|(?:im_start|im_end|im_sep|eot_id|start_header_id|end_header_id|begin_of_text|system|user|assistant|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<\|endoftext\|>"
)


def turn_troubles(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each unusual turn of a chat."""
    for number, message in enumerate(messages, 1):
        before = messages[number - 2] if number > 1 else None
        yield from _empty(number, message)
        if before is not None:
            yield from _repeated(number, message, messages[: number - 1])
            yield from _misplaced(number, message, before)
    if messages and messages[-1]["role"] in ("user", "tool"):
        yield "order", f"the last turn is the {messages[-1]['role']}'s, and nothing answers it"


def _empty(number: int, message: Message) -> Iterator[tuple[str, str]]:
    if message["content"].strip() or "tool_calls" in message or "tools" in message:
        return
    if message["role"] == "assistant":
        if message.get("train") is not False:
            yield "empty_answer", f"turn {number}"
    else:
        yield "empty_turn", f"turn {number} ({message['role']})"


def _repeated(number: int, message: Message, earlier: Sequence[Message]) -> Iterator[tuple[str, str]]:
    content = message["content"].strip()
    if not content or "tool_calls" in message:
        return
    if content == earlier[-1]["content"].strip():
        yield "repeated_turn", f"turn {number} says the same as turn {number - 1}"
    elif len(content) > 20:
        same = [i for i, m in enumerate(earlier, 1) if m["role"] == message["role"] and m["content"].strip() == content]
        if same:
            yield "repeated_turn", f"turn {number} says the same as turn {same[0]}"


def _misplaced(number: int, message: Message, before: Message) -> Iterator[tuple[str, str]]:
    role = message["role"]
    if role == before["role"] and role in ("user", "assistant") and "tool_calls" not in {*message, *before}:
        yield "order", f"turns {number - 1} and {number} are both the {role}'s"
    elif role == "tool" and before["role"] != "tool" and "tool_calls" not in before:
        yield "order", f"turn {number} is a tool's, and no tool call comes before it"
    elif role == "assistant" and before["role"] == "system":
        yield "order", f"turn {number} answers no question"


def markup_troubles(messages: Sequence[Message], encoder: ChatEncoder) -> Iterator[tuple[str, str]]:
    """(kind, detail) of template tokens inside the turns: this checkpoint's own, or another template's."""
    control = control_tokens(encoder.tokenizer)
    for number, message in enumerate(messages, 1):
        answers = message["role"] == "assistant"
        own = typed_tokens(control, message)
        if own:
            kind = "answer_markup" if answers else "rendered" if is_rendered(message, control) else "typed_token"
            yield kind, f"turn {number}: {_listed(own)}"
            continue
        foreign = MARKUP.findall(message["content"])
        if foreign:
            yield "foreign_markup", f"turn {number}: {_listed(foreign)}"


def text_troubles(text: str, encoder: ChatEncoder) -> Iterator[tuple[str, str]]:
    """(kind, detail) of another template's tokens in a ready-made text. It may contain this checkpoint's own tokens."""
    own = control_tokens(encoder.tokenizer).ids
    foreign = [token for token in MARKUP.findall(text) if token not in own]
    if foreign:
        yield "foreign_markup", _listed(foreign)


def call_troubles(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """(kind, detail) of calls of tools that the row lacks, of calls without answer, and of answers without call."""
    tools = {tool["function"]["name"] for tool in messages[0].get("tools", [])} if messages else set()
    known: set[str] = set()
    for number, message in enumerate(messages, 1):
        calls = message.get("tool_calls", [])
        for name in dict.fromkeys(call["function"]["name"] for call in calls):
            if tools and name not in tools:
                yield "calls", f"turn {number} calls `{name}`, which is not among the row's tools"
        known |= {call["id"] for call in calls if "id" in call}
        after = messages[number]["role"] if number < len(messages) else None
        if calls and after not in ("tool", None):
            yield "calls", f"turn {number} calls a tool, and no answer follows"
        if known and "tool_call_id" in message and message["tool_call_id"] not in known:
            yield "calls", f"turn {number} answers a call that no turn makes"


def _listed(tokens: Sequence[str]) -> str:
    """The first three different tokens."""
    different = list(dict.fromkeys(tokens))
    return " ".join(different[:3]) + (" …" if len(different) > 3 else "")


def letter_troubles(text: str) -> Iterator[tuple[str, str]]:
    """(kind, detail) of garbled, lost and hidden letters."""
    ungarbled = _ungarble(text)
    hidden = HIDDEN.findall(ungarbled)
    if hidden:
        letters = "".join(hidden)
        names = list(dict.fromkeys(f"U+{ord(letter):04X}" for letter in letters))
        yield "control", f"{len(letters)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    if LOST in text:
        yield "replaced", f"{text.count(LOST)} lost"
    if ungarbled != text:
        yield "mojibake", ""


def _ungarble(text: str) -> str:
    """The text, with letters repaired by ftfy that were decoded by a wrong encoding."""
    import ftfy
    from ftfy.badness import is_bad

    return str(ftfy.fix_encoding(text)) if not text.isascii() and is_bad(text) else text


def repair(text: str) -> tuple[str, set[str]]:
    """Repair garbled letters, and remove hidden ones.

    Returns:
        the repaired text, and which kinds of findings it had: `mojibake`, `control`.
    """
    ungarbled = _ungarble(text)
    clean = HIDDEN.sub("", ungarbled)
    pairs = (("mojibake", text, ungarbled), ("control", ungarbled, clean))
    return clean, {kind for kind, before, after in pairs if before != after}
