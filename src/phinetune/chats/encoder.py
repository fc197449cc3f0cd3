"""Turns chats into token ids and labels, with the checkpoint's own template.

The labels come from token spans. For the assistant turn `m[i]` of a chat `m`:

    start = how many first tokens render(m[:i], header of the reply) and render(m) share
    end   = how many first tokens render(m[:i+1]) and render(m) share; all tokens if m[i] is the last message

The span holds the turn's content, its end-of-turn token and what the template writes up to the next header or the end.
For a single-turn chat this is TRL's prompt/completion mask. A turn with `train: false` gets no labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from phinetune.chats.control import control_tokens
from phinetune.chats.tagged_text import PLAIN, ResponseTags
from phinetune.chats.template import (
    Message,
    end_of_turn_ids,
    render,
    render_all,
    renders_key,
    renders_role,
    style_of,
    tokenize,
)
from phinetune.chats.tools import ToolStyle
from phinetune.chats.turn_bounds import shared_tokens
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.errors import RowError


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes chats for one checkpoint. Make it with `make_encoder`.

    Attributes:
        loss_on, system: as in the section `data`.
        dropped_roles: roles whose messages the checkpoint's template leaves out without an error.
        end_of_turn: ids of the tokens that end a turn.
        tools: how the template renders tools and calls.
        tags: where the answers of ready-made texts stand; None if that is not known.
    """

    tokenizer: PreTrainedTokenizerBase
    loss_on: str
    system: str
    dropped_roles: frozenset[str]
    end_of_turn: frozenset[int]
    tools: ToolStyle
    tags: ResponseTags | None = None

    @cached_property
    def vocabulary(self) -> int:
        """The highest token id plus one. This is more than the number of tokens if the tokenizer skips ids, as Phi-4
        mini's does.
        """
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def _known_keys(self) -> dict[tuple[str, str], bool]:
        """Whether the template writes a key of a role's turns, for those that were asked for."""
        return {}

    def reads(self, role: str, key: str) -> bool:
        """Whether the template writes what the turns of a role have in a key."""
        if (role, key) not in self._known_keys:
            self._known_keys[role, key] = renders_key(self.tokenizer, role, key)
        return self._known_keys[role, key]

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as they will be rendered: the system message is kept, folded or dropped as configured.

        Raises:
            RowError: a system message stands after the first turn; there is no user turn to fold it into; or the
                template would drop a message, the tools or a tool call without an error.
        """
        chat = list(messages)
        if any(m["role"] == "system" for m in chat[1:]):
            raise RowError("a system message stands after the first turn; move it to the front", "roles")
        self._check_tools(chat)
        if chat[0]["role"] == "system" and self.system != "keep":
            chat = self._without_system(chat)
        for role in self.dropped_roles & {message["role"] for message in chat}:
            hint = "; set data.system to `fold` or `drop`" if role == "system" else ""
            raise RowError(
                f"this checkpoint's chat template drops {role} messages in silence{hint}",
                "system" if role == "system" else "template",
            )
        return chat

    def _check_tools(self, chat: Sequence[Message]) -> None:
        for key, style in (("tools", self.tools.tools), ("tool_calls", self.tools.calls)):
            if style is None and any(key in message for message in chat):
                what = key.replace("_", " ")
                raise RowError(f"this checkpoint's chat template drops {what} in silence", "template")

    def _without_system(self, chat: Sequence[Message]) -> list[Message]:
        """The chat with its system message's text folded into a user turn or dropped. Tools stay where they are."""
        first, *rest = chat
        if self.system == "fold" and first["content"]:
            rest = _fold(first["content"], rest)
        return [{**first, "content": ""}, *rest] if "tools" in first else rest

    def encode(self, chats: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Encode prepared chats. All of them go through the template and the tokenizer together.

        Raises:
            RowError: the template renders the turns before an answer in another way once the answer is there. The error
                does not say in which chat.
        """
        wholes = render_all(self.tokenizer, chats)
        bounds = self._bounds(chats, wholes)
        ids = tokenize(self.tokenizer, wholes)
        places = shared_tokens(self.tokenizer, wholes, ids, bounds)
        return [self._label(*one) for one in zip(chats, ids, map(iter, places), strict=True)]

    def encode_texts(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode ready-made texts. Control tokens in a text become tokens.

        A text that does not end with an end token gets the tokenizer's own. Every token is trained on, or the answers
        alone if it is known where they stand and `loss_on` is not `all`.

        Raises:
            RowError: see `ResponseTags.spans`.
        """
        eos = str(self.tokenizer.eos_token or "")
        ended = [text if text.rstrip().endswith((*self._ends, eos)) else text + eos for text in texts]
        ids = tokenize(self.tokenizer, ended)
        if self.tags is None or self.loss_on == "all":
            return [Encoded(one, list(one)) for one in ids]
        spans = [self.tags.spans(text)[-1 if self.loss_on == "last" else 0 :] for text in texts]
        bounds = [
            [text[:place] for start, end in own for place in ((start, end) if end < len(text) else (start,))]
            for text, own in zip(texts, spans, strict=True)
        ]
        places = shared_tokens(self.tokenizer, ended, ids, bounds)
        return [_answers_alone(*one) for one in zip(ids, places, strict=True)]

    @cached_property
    def _ends(self) -> list[str]:
        """The tokens that end a turn."""
        return [str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.end_of_turn]

    def asked(self, text: str) -> list[Message]:
        """A ready-made text as a prompt and its last answer; empty if it is not known where that begins.

        Raises:
            RowError: see `ResponseTags.spans`.
        """
        return self.tags.chat(text, [*self._ends, str(self.tokenizer.eos_token or "")]) if self.tags else []

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a prepared chat, followed by the header of the assistant's next turn.

        A prompt of a ready-made text (`PLAIN`) stays as it is.
        """
        if messages[0]["role"] == PLAIN:
            return tokenize(self.tokenizer, [messages[0]["content"]])[0]
        return tokenize(self.tokenizer, [render(self.tokenizer, messages, reply=True)])[0]

    def _turns(self, chat: Sequence[Message]) -> list[int]:
        """The turns whose spans are needed: those that are trained on, or with `loss_on: all` those that are not."""
        turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        left_out = {i for i in turns if chat[i].get("train") is False}
        if self.loss_on == "all":
            return sorted(left_out)
        return [i for i in (turns[-1:] if self.loss_on == "last" else turns) if i not in left_out]

    def _bounds(self, chats: Sequence[Sequence[Message]], wholes: Sequence[str]) -> list[list[str]]:
        """For each chat the texts that bound the spans of its `_turns`: start, end, start, end, …

        How many first tokens a text shares with the whole chat is the bound. The last message's end is the end of the
        chat, so it has no text.
        """
        turns = [(n, i) for n, chat in enumerate(chats) for i in self._turns(chat)]
        inner = [(n, i) for n, i in turns if i + 1 < len(chats[n])]
        starts = render_all(self.tokenizer, [chats[n][:i] for n, i in turns], reply=True)
        ends = iter(render_all(self.tokenizer, [chats[n][: i + 1] for n, i in inner]))
        bounds: list[list[str]] = [[] for _ in chats]
        for (n, i), start in zip(turns, starts, strict=True):
            if not wholes[n].startswith(start):
                raise RowError(
                    "this checkpoint's chat template renders the turns before an answer in another way once the "
                    "answer is there, so training would not match use",
                    "template",
                )
            bounds[n] += [start, next(ends)] if i + 1 < len(chats[n]) else [start]
        return bounds

    def _label(self, chat: Sequence[Message], ids: list[int], places: Iterator[int]) -> Encoded:
        """The labels of a chat.

        Args:
            ids: its tokens.
            places: where among the tokens its `_turns` begin and end, in the order of `_bounds`.
        """
        everything = self.loss_on == "all"
        labels = list(ids) if everything else [IGNORED] * len(ids)
        for i in self._turns(chat):
            start = next(places)
            end = next(places) if i + 1 < len(chat) else len(ids)
            if end <= start:
                raise RowError(
                    "this checkpoint's chat template renders an answer in another way once a turn follows it, so it "
                    "can't be trained on there; set data.loss_on to `last`, or split the chat",
                    "template",
                )
            labels[start:end] = [IGNORED] * (end - start) if everything else ids[start:end]
        return Encoded(ids, labels)

    def fit(self, messages: Sequence[Message], max_length: int) -> tuple[list[Message], Encoded] | None:
        """Cut a chat's prompt until the chat fits into `max_length` tokens. None if that is impossible.

        The oldest turns are left out first; a system message stays. Then the end of the longest remaining prompt
        message is cut. Answers and end tokens are never cut.

        Returns:
            the messages that are left, and their encoding.
        """
        shorter = [list(messages)]
        while (without := _without_oldest_exchange(shorter[-1])) is not None:
            shorter.append(without)
        fits = bisect_left(range(len(shorter) - 1), True, key=lambda i: self._length(shorter[i]) <= max_length)
        chat = shorter[fits]
        encoded = self.encode([chat])[0]
        for _ in range(4):  # at a cut tokens can merge in another way, so the first try may miss by a few tokens
            excess = len(encoded.input_ids) - max_length
            if excess <= 0:
                return chat, encoded
            shortened = self._shorten_prompt(chat, excess)
            if shortened is None:
                return None
            chat = shortened
            encoded = self.encode([chat])[0]
        return (chat, encoded) if len(encoded.input_ids) <= max_length else None

    def _length(self, chat: Sequence[Message]) -> int:
        return len(tokenize(self.tokenizer, [render(self.tokenizer, chat)])[0])

    def _shorten_prompt(self, chat: Sequence[Message], excess: int) -> list[Message] | None:
        prompts = [i for i, m in enumerate(chat) if m["role"] in ("user", "tool")]
        if not prompts:
            return None
        longest = max(prompts, key=lambda i: len(chat[i]["content"]))
        content = chat[longest]["content"]
        offsets = self._offsets(content)
        if len(offsets) <= excess:
            return None
        cut = {**chat[longest], "content": content[: offsets[len(offsets) - excess][0]]}
        return [*chat[:longest], cut, *chat[longest + 1 :]]

    def _offsets(self, content: str) -> list[tuple[int, int]]:
        control = control_tokens(self.tokenizer)
        if control.find(content):
            return control.offsets(content)
        return list(self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    loss_on: str = "assistant",
    system: str = "keep",
    tags: ResponseTags | None = None,
) -> ChatEncoder:
    """An encoder for this tokenizer. It renders a few chats to find out which roles the template drops.

    Args:
        loss_on, system: as in the section `data`.
        tags: where the answers of ready-made texts stand.
    """
    dropped = frozenset(role for role in ("system", "tool") if not renders_role(tokenizer, role))
    ends = frozenset(end_of_turn_ids(tokenizer))
    return ChatEncoder(tokenizer, loss_on, system, dropped, ends, style_of(tokenizer), tags)


def _answers_alone(ids: list[int], places: Sequence[int]) -> Encoded:
    """A text's tokens with labels on its answers. `places`: where each begins and ends; the last may have no end."""
    labels = [IGNORED] * len(ids)
    for start, end in zip(places[::2], [*places[1::2], len(ids)], strict=False):
        labels[start:end] = ids[start:end]
    return Encoded(ids, labels)


def ends_a_turn(encoder: ChatEncoder, rows: Iterable[Encoded]) -> bool:
    """Whether any label is an end-of-turn token. Without one, the model never learns to stop."""
    return any(label in encoder.end_of_turn for row in rows for label in row.labels)


def _fold(system: str, chat: list[Message]) -> list[Message]:
    for i, message in enumerate(chat):
        if message["role"] == "user":
            folded: Message = {"role": "user", "content": f"{system}\n\n{message['content']}"}
            return [*chat[:i], folded, *chat[i + 1 :]]
    raise RowError("there is no user turn to fold the system message into", "system")


def _without_oldest_exchange(chat: Sequence[Message]) -> list[Message] | None:
    """The chat without its first user turn and all that follows up to the next one.

    None if there is no other user turn, or no answer would be left.
    """
    head = [m for m in chat[:1] if m["role"] == "system"]
    users = [i for i, m in enumerate(chat) if m["role"] == "user"]
    if len(users) < 2:
        return None
    rest = list(chat[users[1] :])
    return head + rest if any(m["role"] == "assistant" for m in rest) else None
