"""What is asked of an answering engine, and what comes back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Reason = Literal["stop", "length", "cancelled", "failed"]


class Busy(Exception):
    """Too many requests wait already."""


class TooLong(Exception):
    """A prompt has more tokens than the engine has room for, its answer included.

    Attributes:
        tokens, room: how many the prompt has, and how many a conversation may have.
    """

    def __init__(self, tokens: int, room: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens, and there is room for {room}, answer included")
        self.tokens, self.room = tokens, room


class Constraint(Protocol):
    """Keeps an answer within a grammar, token by token."""

    def mask_(self, logits: Tensor) -> None:
        """Set the logits of tokens that may not come next to minus infinity, in place; shape (vocabulary)."""

    def take(self, token: int) -> bool:
        """Note the token that was taken. Returns whether the answer is complete and nothing may follow."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        prompt: token ids, at least one.
        max_new: how many tokens the answer may have.
        adapter: which adapter answers; None is the base.
        stops: ids that end an answer. Such an id is not handed out.
        min_new: how many tokens it has at least; before that, no stop id is taken.
        temperature: what logits are divided by before a token is drawn; 0 always takes the likeliest.
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        seed: the same seed gives the same draws, whatever else is in the batch. None: another one each time.
        top_logprobs: how many of the likeliest tokens are handed out with each token, with their logarithmic
            probabilities; 0 hands out the taken token's alone, None none.
        bias: numbers to add to logits, by token id.
        presence, frequency: what is taken off the logit of a token that the answer has already: once, and for each
            time that it has it.
        constraint: makes what keeps the answer within a grammar; None: nothing does.
    """

    prompt: Sequence[int]
    max_new: int
    adapter: str | None = None
    stops: frozenset[int] = frozenset()
    min_new: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    constraint: Callable[[], Constraint] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest one, and nothing else is to be known of it."""
        bent = self.bias or self.presence or self.frequency or self.constraint or self.min_new
        return self.temperature <= 0 and self.top_logprobs is None and not bent


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        logprob: its logarithmic probability, before temperature and bias; None if it was not asked for.
        top: the likeliest tokens and theirs, the likeliest first.
        last: whether the grammar allows nothing after it.
        text: its text, where whoever answers says it; None: it is what the tokenizer makes of the id.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    last: bool = False
    text: str | None = None


@dataclass(frozen=True)
class Ended:
    """The end of an answer.

    Attributes:
        reason: `stop`: it ended by itself; `length`: it reached its limit; `cancelled`: nobody wants it any more;
            `failed`: the engine could not go on.
        reused: how many tokens of the prompt were not computed, since another conversation began with them.
        error: what went wrong, if it failed.
    """

    reason: Reason
    reused: int = 0
    error: BaseException | None = None


Event = Token | Ended


class AnswerStream:
    """The events of one answer, from the engine's thread to any other.

    Iterate over it for its tokens; then `end` says how it ended. With a listener, all events go there instead.
    """

    def __init__(self, listener: Callable[[Event], None] | None = None) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = listener or self._events.put
        self._cancelled = threading.Event()
        self.on_cancel: Callable[[], None] = lambda: None
        self.end: Ended | None = None

    def cancel(self) -> None:
        """Say that the answer is not wanted any more. May be called from any thread, and more than once."""
        self._cancelled.set()
        self.on_cancel()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, event: Event) -> None:
        """For the engine: hand an event over."""
        if isinstance(event, Ended):
            self.end = event
        self._deliver(event)

    def __iter__(self) -> Iterator[Token]:
        while isinstance(event := self._events.get(), Token):
            yield event
