"""Answers that are under way, in the server's event loop: their pieces of text, how they end, and what they took."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from phinetune.engine.continuous.requests import AnswerStream, Busy, Ended, Event, Request, Token, TooLong
from phinetune.serving.answers.answerer import Answerer
from phinetune.serving.answers.texts import AnswerText
from phinetune.serving.errors import ApiError, too_many

logger = logging.getLogger(__name__)


@dataclass
class Choice:
    """One answer of a request.

    Attributes:
        text: makes its text.
        tokens: of the answer so far.
        told: how many of them have been handed out with a piece.
        finish: how it ended, as the API calls it; None while it goes on.
        reused: tokens of its prompt that were not computed.
        said: its text so far.
    """

    index: int
    text: AnswerText
    tokens: list[Token] = field(default_factory=list)
    told: int = 0
    finish: str | None = None
    reused: int = 0
    said: str = ""


@dataclass(frozen=True)
class Piece:
    """What has come of a choice.

    Attributes:
        text: its next text, which may be empty.
        tokens: the tokens that have come with it.
    """

    choice: Choice
    text: str
    tokens: Sequence[Token]


class Running:
    """The answers to one request.

    Attributes:
        when_ended: is called with the texts of all choices, tool calls as the model wrote them, once they have ended;
            also if nobody wanted their ends.
    """

    def __init__(self, answerer: Answerer, requests: Sequence[Request], texts: Sequence[AnswerText]) -> None:
        """Ask for them.

        Raises:
            ApiError: too many requests wait, or a prompt is too long.
        """
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.choices = [Choice(i, text) for i, text in enumerate(texts)]
        self._streams: list[AnswerStream] = []
        self.when_ended: Callable[[list[str]], None] = lambda texts: None
        try:
            for i, request in enumerate(requests):
                self._streams.append(answerer.engine.submit(request, self._listener(i)))
        except Busy as error:
            self.cancel()
            raise too_many(f"The model is answering as many as it can: {error}. Try again in a moment.") from None
        except TooLong as error:
            self.cancel()
            raise too_long(error.tokens, error.room) from None
        except KeyError:  # its adapter has left for others since it was found
            self.cancel()
            raise ApiError(503, "The model has just left the memory. Try again.", "server_error") from None
        except RuntimeError as error:  # the engine was closed in this moment
            self.cancel()
            raise ApiError(503, f"The model can't answer now: {error}. Try again.", "server_error") from None
        except BaseException:
            self.cancel()
            raise

    def _listener(self, index: int) -> Any:
        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped: nobody listens any more
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return listen

    def cancel(self) -> None:
        """Nobody wants these answers any more."""
        for stream in self._streams:
            stream.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come; the last of each has its finish.

        Raises:
            ApiError: the engine could not go on.
        """
        left = len(self.choices)
        try:
            while left:
                index, event = await self._queue.get()
                choice = self.choices[index]
                if isinstance(event, Ended):
                    left -= 1
                    yield self._ended(choice, event)
                elif (piece := self._token(choice, event)) is not None:
                    yield piece
        finally:
            self.cancel()
            self.when_ended([choice.said + choice.text.calls for choice in self.choices])

    def _token(self, choice: Choice, token: Token) -> Piece | None:
        over = choice.text.stopped
        if over:
            return None
        choice.tokens.append(token)
        text = choice.text.add(token.id, token.text)
        if choice.text.stopped:
            self._streams[choice.index].cancel()
        return self._piece(choice, text) if text else None

    def _ended(self, choice: Choice, event: Ended) -> Piece:
        if event.reason == "failed":
            logger.error("an answer failed", exc_info=event.error)
            raise ApiError(500, "The server had an error while it answered; its log says which.", "server_error")
        if event.reason == "cancelled" and not choice.text.stopped:
            raise ApiError(503, "The server stops, and this answer with it.", "server_error")
        text = choice.text.finish()
        choice.reused = event.reused
        choice.finish = "length" if event.reason == "length" and not choice.text.stopped else "stop"
        return self._piece(choice, text)

    def _piece(self, choice: Choice, text: str) -> Piece:
        tokens = choice.tokens[choice.told :]
        choice.told = len(choice.tokens)
        choice.said += text
        return Piece(choice, text, tokens)

    @property
    def answered(self) -> int:
        """Tokens of all answers."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def reused(self) -> int:
        """Tokens of the prompt that had been computed before."""
        return self.choices[0].reused if self.choices else 0


def too_long(tokens: int, room: int) -> ApiError:
    """The error for a prompt that leaves no room for an answer."""
    return ApiError(
        400,
        f"This model's maximum context length is {room} tokens. However, your messages resulted in {tokens} tokens. "
        "Please reduce the length of the messages.",
        code="context_length_exceeded",
        param="messages",
    )


def answer_room(answerer: Answerer, prompt: Sequence[int], wanted: int | None) -> int:
    """How many tokens an answer may have: what was asked for, or all that there is room for.

    Raises:
        ApiError: the prompt leaves no room.
    """
    left = answerer.engine.room - len(prompt)
    if left < 1:
        raise too_long(len(prompt), answerer.engine.room)
    if wanted is not None and wanted > left:
        logger.info("an answer of %d tokens was asked for, and there is room for %d", wanted, left)
    return min(left, wanted or left)
