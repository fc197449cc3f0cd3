"""`/v1/completions`: texts that go on from a text, without a chat's template."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phinetune.engine.continuous.requests import Request, Token
from phinetune.serving.answers.answerer import Answerer
from phinetune.serving.answers.chat import usage, with_seed
from phinetune.serving.answers.content_log import ContentLog
from phinetune.serving.answers.forms import MOST_CHOICES, CompletionAsked
from phinetune.serving.answers.preparing import Find, Preparing
from phinetune.serving.answers.running import Piece, Running, answer_room
from phinetune.serving.answers.sse import DONE, ended_with_client, event, stream
from phinetune.serving.answers.texts import AnswerText, Decoder
from phinetune.serving.errors import ApiError

if TYPE_CHECKING:
    from fastapi import APIRouter

    from phinetune.serving.state import ServerState

TOKENS = 16  # the API's default of `max_tokens`


def add_to(router: APIRouter, state: ServerState, preparing: Preparing) -> None:
    """Add the endpoint."""
    from fastapi import Request as HttpRequest

    contents = ContentLog(state.settings.log_contents)

    async def create(asked: CompletionAsked, http: HttpRequest) -> Any:
        asked.check()
        work = await preparing.do(lambda find: _prepare(asked, find))
        texts = [AnswerText(Decoder(work.answerer.tokenizer), asked.stops) for _ in work.requests]
        running = Running(work.answerer, work.requests, texts)
        state.count('phinetune_answers_total{endpoint="completions"}')
        reply = _Reply(asked, work, running)
        contents.follow(running, reply.id, asked.model, asked.prompt)
        if asked.stream:
            return stream(running, reply.events())
        async with ended_with_client(http, running):
            return await reply.whole()

    create.__annotations__ |= {"asked": CompletionAsked, "http": HttpRequest}
    router.post("/completions", response_model=None, summary="Go on from a text")(create)


@dataclass(frozen=True)
class _Work:
    """A request, ready for the engine: `n` requests for each prompt, one after the other."""

    answerer: Answerer
    prompts: list[list[int]]
    requests: list[Request]


def _prepare(asked: CompletionAsked, find: Find) -> _Work:
    choices = asked.n or 1
    if (asked.best_of or choices) != choices:
        raise ApiError(400, "'best_of' must be 'n' on this server.", code="unsupported_parameter", param="best_of")
    if asked.echo and asked.logprobs is not None:
        raise ApiError(
            400, "'echo' with 'logprobs' is not there on this server.", code="unsupported_parameter", param="echo"
        )
    answerer = find(asked.model)
    prompts = _prompts(asked, answerer)
    if len(prompts) * choices > MOST_CHOICES:
        raise ApiError(
            400, f"Prompts times 'n' may be up to {MOST_CHOICES} on this server.", code="invalid_value", param="prompt"
        )
    requests = []
    for prompt in prompts:
        request = Request(
            prompt,
            answer_room(answerer, prompt, asked.max_tokens or TOKENS),
            adapter=answerer.adapter,
            stops=answerer.base.stops,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_logprobs=asked.logprobs,
            bias=asked.bias(answerer.vocabulary),
            presence=asked.presence_penalty or 0,
            frequency=asked.frequency_penalty or 0,
        )
        requests += [with_seed(request, asked.seed, i) for i in range(choices)]
    return _Work(answerer, prompts, requests)


def _prompts(asked: CompletionAsked, answerer: Answerer) -> list[list[int]]:
    """The token ids of the prompts, however they were given.

    Raises:
        ApiError: one is empty, or has an id that the model does not have.
    """
    given: Any = asked.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    prompts = []
    for one in given:
        ids = answerer.tokenizer(one)["input_ids"] if isinstance(one, str) else list(one)
        if not ids or not all(0 <= id < answerer.vocabulary for id in ids):
            problem = "has an id that is no token of this model" if ids else "is empty"
            raise ApiError(400, f"A prompt {problem}.", code="invalid_value", param="prompt")
        prompts.append(ids)
    if not prompts:
        raise ApiError(400, "'prompt' is empty.", code="invalid_value", param="prompt")
    return prompts


class _Reply:
    """Answers to one request in the API's form."""

    def __init__(self, asked: CompletionAsked, work: _Work, running: Running) -> None:
        self._asked, self._work, self._running = asked, work, running
        self.id = f"cmpl-{secrets.token_hex(12)}"
        head = {"id": self.id, "object": "text_completion", "created": int(time.time())}
        self._head = {**head, "model": asked.model}
        self._offsets = [len(self._echo(i)) for i in range(len(work.requests))]

    def _echo(self, index: int) -> str:
        """The prompt of a choice, if answers begin with it."""
        if not self._asked.echo:
            return ""
        return str(self._work.answerer.tokenizer.decode(self._work.requests[index].prompt, skip_special_tokens=True))

    async def whole(self) -> dict[str, Any]:
        texts = [self._echo(i) for i in range(len(self._running.choices))]
        async for piece in self._running.pieces():
            texts[piece.choice.index] += piece.text
        choices = [
            {
                "index": one.index,
                "text": text,
                "logprobs": self._logprobs(one.index, one.tokens),
                "finish_reason": one.finish,
            }
            for one, text in zip(self._running.choices, texts, strict=True)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        wants_usage = bool(self._asked.stream_options and self._asked.stream_options.include_usage)
        extra: dict[str, Any] = {"usage": None} if wants_usage else {}
        for i in range(len(self._running.choices) if self._asked.echo else 0):
            yield event({**self._head, "choices": [self._part(i, self._echo(i), None, None)], **extra})
        async for piece in self._running.pieces():
            yield event({**self._head, "choices": [self._piece(piece)], **extra})
        if wants_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def _piece(self, piece: Piece) -> dict[str, Any]:
        index = piece.choice.index
        return self._part(index, piece.text, self._logprobs(index, piece.tokens), piece.choice.finish)

    def _part(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        texts = self._work.answerer.base.token_texts
        names, offsets = [texts(token.id)[0] for token in tokens], []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{texts(id)[0]: logprob for id, logprob in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _usage(self) -> Mapping[str, Any]:
        return usage(sum(map(len, self._work.prompts)), self._running.answered, self._running.reused)
