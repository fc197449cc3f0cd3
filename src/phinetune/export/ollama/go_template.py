"""A chat template in Go's template language, as Ollama takes it, for system, user and assistant messages.

What the Jinja template writes around each message is found by rendering with it; what is found is put together again
for a few conversations and compared with the template's own rendering, so a template that does more is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from phinetune.chat.template import Message, render
from phinetune.errors import ModelError

FIRST, SECOND, THIRD = "zqxa", "zqxb", "zqxc"  # letters that no template writes by itself
# White space and signs around a content show whether the template cuts or escapes it.
TEXTS = ("How many?", " two\n", "{{ \"3\" }} <&> '4'")


@dataclass(frozen=True)
class Turns:
    """What a template writes.

    Attributes:
        start: in front of everything.
        without_system: next, where the first message is no system message.
        around: before and after each role's content; a role that is not there is left out of the text.
        empty_system: whether an empty system message is written.
        reply: after the last message, the header of the answer.
    """

    start: str
    without_system: str
    around: dict[str, tuple[str, str]]
    empty_system: bool
    reply: str

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation up to and with the header of the answer."""
        text = self.start
        if messages[0]["role"] != "system":
            text += self.without_system
        for message in messages:
            role, content = message["role"], message["content"]
            if role in self.around and (content or role != "system" or self.empty_system):
                before, after = self.around[role]
                text += before + content + after
        return text + self.reply

    def in_go(self, with_start: bool = True) -> str:
        """The same as a Go template over Ollama's `.Messages`."""
        parts = [_literal(self.start)] if with_start else []
        if self.without_system:
            default = _literal(self.without_system)
            parts.append(
                '{{ if .Messages }}{{ if ne (index .Messages 0).Role "system" }}' + default + "{{ end }}{{ end }}"
            )
        parts.append("{{ range .Messages }}")
        for i, (role, (before, after)) in enumerate(self.around.items()):
            body = _literal(before) + "{{ .Content }}" + _literal(after)
            if role == "system" and not self.empty_system:
                body = "{{ if .Content }}" + body + "{{ end }}"
            parts.append("{{ " + ("else " if i else "") + f'if eq .Role "{role}" }}}}' + body)
        return "".join([*parts, "{{ end }}{{ end }}", _literal(self.reply)])


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """What the tokenizer's chat template writes around the messages of a conversation.

    Raises:
        ModelError: it does more than write something around each.
    """
    try:
        turns = _found(tokenizer)
        conversations = _conversations()
        same = all(turns.render(chat) == render(tokenizer, chat, reply=True) for chat in conversations)
    except Exception as error:  # a template refuses by raising whatever Jinja or its author chose
        raise ModelError(_refusal(tokenizer, f"it refuses a plain conversation: {error}")) from error
    if not same:
        raise ModelError(_refusal(tokenizer, "it does more than write something before and after each message"))
    return turns


def _refusal(tokenizer: PreTrainedTokenizerBase, why: str) -> str:
    return (
        f"{tokenizer.name_or_path}: its chat template can't be written in Ollama's language: {why}; --to gguf makes a "
        "file that llama.cpp runs with the template itself"
    )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _conversations() -> list[list[Message]]:
    one, two, three = TEXTS
    system = _message("system", two)
    chat = [_message("user", one), _message("assistant", two), _message("user", three)]
    return [
        chat[:1],
        chat,
        [*chat, _message("assistant", three), _message("user", two)],
        [system, chat[0]],
        [system, *chat],
        [_message("system", ""), *chat],
        [_message("user", two), _message("assistant", three), _message("user", "")],
    ]


def _found(tokenizer: PreTrainedTokenizerBase) -> Turns:
    user, answer = _message("user", FIRST), _message("assistant", SECOND)
    head, between, again, _ = _cut(render(tokenizer, [user, answer, _message("user", THIRD)], reply=True))
    _, tail = _cut(render(tokenizer, [user], reply=True))
    after_user = _closing(render(tokenizer, [user]).split(FIRST)[1], between, tokenizer)
    after_answer = _closing(render(tokenizer, [user, answer]).split(SECOND)[1], again, tokenizer)
    before_user, before_answer = again.removeprefix(after_answer), between.removeprefix(after_user)
    opening = head.removesuffix(before_user)
    start = str(tokenizer.bos_token or "")
    if before_user.startswith(start) or not opening.startswith(start):  # what opens every turn is no start
        start = ""
    around = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    system = _around_system(tokenizer, before_user, start)
    empty = render(tokenizer, [_message("system", ""), user], reply=True)
    written = bool(system) and empty != render(tokenizer, [user], reply=True).replace(opening, start, 1)
    return Turns(start, opening.removeprefix(start), {**system, **around}, written, tail.removeprefix(after_user))


def _cut(text: str) -> list[str]:
    """What stands between the probes."""
    for probe in (SECOND, THIRD):
        text = text.replace(probe, FIRST)
    return text.split(FIRST)


def _closing(tail: str, seen: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What closes a turn, of what ends a conversation there: without what only the end of a whole one has."""
    return tail if seen.startswith(tail) else tail.removesuffix(str(tokenizer.eos_token))


def _around_system(tokenizer: PreTrainedTokenizerBase, before_user: str, start: str) -> dict[str, tuple[str, str]]:
    text = render(tokenizer, [_message("system", FIRST), _message("user", SECOND)], reply=True)
    if FIRST not in text:
        return {}
    before, after, _ = _cut(text)
    return {"system": (before.removeprefix(start), after.removesuffix(before_user))}


def _literal(text: str) -> str:
    """Text as a Go template writes it: braces that would open an action stand in quotes."""
    return text.replace("{{", '{{ "{{" }}')
