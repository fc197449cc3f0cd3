"""A chat template in Go's template language, which Ollama uses, for system, user and assistant messages.

Jinja can do more than Go's templates, so the Jinja template is not translated. Instead, it renders conversations of
known words, and these show what it writes around each message. Then a few other conversations are put together from
what was found. If the Jinja template renders one of them differently, it does something else, and it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from phinetune.chats.template import Message, render
from phinetune.errors import ModelError

FIRST, SECOND, THIRD = "zqxa", "zqxb", "zqxc"  # the known words; no template writes them by itself
# Contents with white space and signs at their ends. They show whether the template trims or escapes a content.
TEXTS = ("How many?", " two\n", "{{ \"3\" }} <&> '4'")


@dataclass(frozen=True)
class Turns:
    """What a template writes around the messages of a conversation.

    Attributes:
        start: the text in front of everything.
        without_system: the text after `start` if the first message is not a system message.
        around: the text before and after a content, by role. Messages of other roles are left out.
        empty_system: whether a system message without words is written.
        reply: the header of the answer, after the last message.
    """

    start: str
    without_system: str
    around: dict[str, tuple[str, str]]
    empty_system: bool
    reply: str

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, with the header of the answer at its end."""
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
        """A Go template that renders Ollama's `.Messages` in the same way."""
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
    """Find out what the tokenizer's chat template writes around the messages of a conversation.

    Raises:
        ModelError: the template does more than write something around each message.
    """
    try:
        turns = _probe(tokenizer)
        conversations = _conversations()
        same = all(turns.render(chat) == render(tokenizer, chat, reply=True) for chat in conversations)
    except Exception as error:  # a template refuses by raising any error that Jinja or its author chose
        raise ModelError(_refusal(tokenizer, f"it refuses a simple conversation: {error}")) from error
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
    """Conversations to compare: with and without a system message, and with empty contents."""
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


def _probe(tokenizer: PreTrainedTokenizerBase) -> Turns:
    user, answer = _message("user", FIRST), _message("assistant", SECOND)
    head, between, again, _ = _pieces(render(tokenizer, [user, answer, _message("user", THIRD)], reply=True))
    _, tail = _pieces(render(tokenizer, [user], reply=True))
    after_user = _closing(render(tokenizer, [user]).split(FIRST)[1], between, tokenizer)
    after_answer = _closing(render(tokenizer, [user, answer]).split(SECOND)[1], again, tokenizer)
    before_user, before_answer = again.removeprefix(after_answer), between.removeprefix(after_user)
    opening = head.removesuffix(before_user)
    start = str(tokenizer.bos_token or "")
    if before_user.startswith(start) or not opening.startswith(start):  # a token that opens every turn is no start
        start = ""
    around = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    system = _around_system(tokenizer, before_user, start)
    empty = render(tokenizer, [_message("system", ""), user], reply=True)
    without = render(tokenizer, [user], reply=True).replace(opening, start, 1)
    return Turns(
        start=start,
        without_system=opening.removeprefix(start),
        around={**system, **around},
        empty_system=bool(system) and empty != without,
        reply=tail.removeprefix(after_user),
    )


def _pieces(text: str) -> list[str]:
    """The pieces of a rendered text between the known words."""
    for word in (SECOND, THIRD):
        text = text.replace(word, FIRST)
    return text.split(FIRST)


def _closing(tail: str, between: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that closes a turn.

    Args:
        tail: what the template writes after the content of a conversation's last message. It may add an end token
            that closes the conversation, not the turn.
        between: what it writes between this content and the next one. It begins with the text that closes the turn.
    """
    return tail if between.startswith(tail) else tail.removesuffix(str(tokenizer.eos_token))


def _around_system(tokenizer: PreTrainedTokenizerBase, before_user: str, start: str) -> dict[str, tuple[str, str]]:
    """The text before and after a system message, by its role; empty if the template leaves such messages out."""
    text = render(tokenizer, [_message("system", FIRST), _message("user", SECOND)], reply=True)
    if FIRST not in text:
        return {}
    before, after, _ = _pieces(text)
    return {"system": (before.removeprefix(start), after.removesuffix(before_user))}


def _literal(text: str) -> str:
    """A text as part of a Go template. Braces that would open an action are quoted."""
    return text.replace("{{", '{{ "{{" }}')
