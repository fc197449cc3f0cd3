"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phinetune.engine.continuous.requests import Constraint, Request, Token
from phinetune.serving.answers.answerer import Answerer
from phinetune.serving.answers.content_log import ContentLog
from phinetune.serving.answers.forms import ChatAsked
from phinetune.serving.answers.grammars import Calls
from phinetune.serving.answers.kept import CHAT, KeptAnswers
from phinetune.serving.answers.preparing import Find, Preparing
from phinetune.serving.answers.prompts import chat_ids, read_messages
from phinetune.serving.answers.running import Choice, Piece, Running, answer_room
from phinetune.serving.answers.sse import DONE, ended_with_client, event, stream
from phinetune.serving.answers.texts import AnswerText, Decoder
from phinetune.serving.answers.tool_calls import read_tool_calls
from phinetune.serving.errors import ApiError

if TYPE_CHECKING:
    from fastapi import APIRouter

    from phinetune.serving.state import ServerState

logger = logging.getLogger(__name__)


def add_to(router: APIRouter, state: ServerState, preparing: Preparing, kept: KeptAnswers) -> None:
    """Add the endpoint."""
    from fastapi import Request as HttpRequest

    contents = ContentLog(state.settings.log_contents)

    async def create(asked: ChatAsked, http: HttpRequest) -> Any:
        asked.check()
        work = await preparing.do(lambda find: _prepare(asked, find))
        running = Running(work.answerer, work.requests, work.texts())
        state.count('phinetune_answers_total{endpoint="chat_completions"}')
        reply = _Reply(asked, work, running, kept)
        contents.follow(running, reply.id, asked.model, asked.messages)
        if asked.stream:
            return stream(running, reply.events())
        async with ended_with_client(http, running):
            return await reply.whole()

    create.__annotations__ |= {"asked": ChatAsked, "http": HttpRequest}
    router.post("/chat/completions", response_model=None, summary="Answer a chat")(create)


@dataclass(frozen=True)
class _Work:
    """A request, ready for the engine.

    Attributes:
        names: of the tools that may be called.
    """

    answerer: Answerer
    prompt: list[int]
    requests: list[Request]
    stops: list[str]
    names: list[str]

    def texts(self) -> list[AnswerText]:
        form = self.answerer.base.call_form if self.names else None
        shown, mark = (form.ids, form.begin) if form else (frozenset(), "")
        return [
            AnswerText(Decoder(self.answerer.tokenizer, shown), self.stops, mark or None, bare=bool(form and not mark))
            for _ in self.requests
        ]


def _prepare(asked: ChatAsked, find: Find) -> _Work:
    """Check a request and make the engine's of it."""
    messages = read_messages(asked.messages)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", code="invalid_value", param="top_logprobs")
    answerer = find(asked.model)
    tools = _tools(asked, answerer)
    prompt = chat_ids(answerer, messages, asked.tools or [] if tools else [])
    limit = answer_room(answerer, prompt, asked.max_completion_tokens or asked.max_tokens)
    request = Request(
        prompt,
        limit,
        adapter=answerer.adapter,
        stops=answerer.base.stops,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        bias=asked.bias(answerer.vocabulary),
        presence=asked.presence_penalty or 0,
        frequency=asked.frequency_penalty or 0,
        constraint=_constraint(asked, answerer, tools),
    )
    requests = [with_seed(request, asked.seed, i) for i in range(asked.n or 1)]
    return _Work(answerer, prompt, requests, asked.stops, [tool["name"] for tool in tools])


def with_seed(request: Request, seed: int | None, index: int) -> Request:
    """The request of one of several choices: each has draws of its own, and the same ones for the same seed."""
    from dataclasses import replace

    return replace(request, seed=None if seed is None else seed + index)


def _tools(asked: ChatAsked, answerer: Answerer) -> list[Mapping[str, Any]]:
    """The functions that may be called.

    Raises:
        ApiError: a tool is none, or the model's template has no place for tools.
    """
    if not asked.tools or asked.tool_choice == "none":
        return []
    functions = [tool.get("function") for tool in asked.tools]
    for i, function in enumerate(functions):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"'tools[{i}]' is no function with a name.", code="invalid_value", param=f"tools[{i}]")
    if answerer.encoder.tools.tools is None:
        raise ApiError(
            400, f"The chat template of `{asked.model}` has no place for tools.", code="unsupported_parameter",
            param="tools",
        )  # fmt: skip
    return [function for function in functions if function]


def _constraint(
    asked: ChatAsked, answerer: Answerer, tools: Sequence[Mapping[str, Any]]
) -> Callable[[], Constraint] | None:
    """What keeps the answer to a call, or to the form that was asked for; to either where a call may be made."""
    forced = _forced(asked, tools)
    if forced:
        return answerer.base.grammars.call(_calls(answerer, forced))
    form_asked = asked.response_format
    if form_asked is None or form_asked.type == "text":
        _tell_not_strict(tools)
        return None
    calls = _calls(answerer, tools) if tools else None
    if form_asked.type == "json_object":
        return answerer.base.grammars.json({"type": "object"}, "response_format", calls)
    if form_asked.json_schema is None:
        raise ApiError(
            400, "Missing required parameter: 'response_format.json_schema'.", code="missing_required_parameter",
            param="response_format.json_schema",
        )  # fmt: skip
    return answerer.base.grammars.json(form_asked.json_schema.schema_, "response_format", calls)


def _calls(answerer: Answerer, tools: Sequence[Mapping[str, Any]]) -> Calls:
    form = answerer.base.call_form
    return Calls((form.begin, form.end), tools, form.listed)


def _tell_not_strict(tools: Sequence[Mapping[str, Any]]) -> None:
    for i, tool in enumerate(tools):
        if tool.get("strict"):
            logger.info("parameter tools[%d].function.strict: not applied, since 'tool_choice' forces no call", i)


def _forced(asked: ChatAsked, tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The functions of which one has to be called; empty if none has to be."""
    choice = asked.tool_choice
    if choice in (None, "auto", "none"):
        return []
    if choice == "required":
        chosen = list(tools)
    else:
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        chosen = [tool for tool in tools if tool["name"] == name]
    if not chosen:
        raise ApiError(400, "'tool_choice' names no tool of 'tools'.", code="invalid_value", param="tool_choice")
    return chosen


class _Reply:
    """Answers to one request in the API's form."""

    def __init__(self, asked: ChatAsked, work: _Work, running: Running, kept: KeptAnswers) -> None:
        self._asked, self._work, self._running, self._kept = asked, work, running, kept
        self._texts = [""] * len(running.choices)
        self._called: dict[int, list[dict[str, Any]]] = {}
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": asked.model}

    async def whole(self) -> dict[str, Any]:
        async for piece in self._running.pieces():
            self._texts[piece.choice.index] += piece.text
        made = self._completion()
        if self._asked.store:
            await self._keep(made)
        return made

    def _completion(self) -> dict[str, Any]:
        """The whole completion, once all of its answers have ended."""
        choices = [self._choice(one) for one in self._running.choices]
        made = {**self._head, "object": CHAT, "choices": choices, "usage": self._usage()}
        return {**made, "metadata": self._asked.metadata or {}} if self._asked.store else made

    async def _keep(self, made: Mapping[str, Any]) -> None:
        """Let the client find it again."""
        await asyncio.to_thread(self._kept.put, CHAT, made, self._asked.messages)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = self._texts[choice.index]
        calls, rest = self._calls(choice)
        message: dict[str, Any] = {"role": "assistant", "content": text + rest, "refusal": None}
        if calls:
            message |= {"content": (text + rest).strip() or None, "tool_calls": calls}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": "tool_calls" if calls else choice.finish,
        }

    def _calls(self, choice: Choice) -> tuple[list[dict[str, Any]], str]:
        """The calls of an answer, and what looked like one and is none, which is text."""
        if choice.index not in self._called:  # each reading gives them other ids
            said = choice.text.calls
            self._called[choice.index] = self._wanted(read_tool_calls(said, self._work.names)) if said else []
        calls = self._called[choice.index]
        return calls, "" if calls else choice.text.calls

    def _wanted(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._asked.parallel_tool_calls is not False or len(calls) < 2:
            return calls
        logger.info("%s: %d calls after the first are left out ('parallel_tool_calls')", self.id, len(calls) - 1)
        return calls[:1]

    async def events(self) -> AsyncIterator[str]:
        for choice in self._running.choices:
            yield self._event(choice, {"role": "assistant", "content": "", "refusal": None})
        async for piece in self._running.pieces():
            self._texts[piece.choice.index] += piece.text
            if piece.text:
                yield self._event(piece.choice, {"content": piece.text}, piece)
            if piece.choice.finish:
                for one in self._last_events(piece):
                    yield one
        if self._asked.store:
            await self._keep(self._completion())
        if self._asked.stream_options and self._asked.stream_options.include_usage:
            yield event(self._chunk([], self._usage()))
        yield DONE

    def _last_events(self, piece: Piece) -> list[str]:
        choice = piece.choice
        calls, rest = self._calls(choice)
        made = []
        if calls:
            made.append(self._event(choice, {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}))
        elif rest or (piece.tokens and not piece.text and self._asked.logprobs):
            made.append(self._event(choice, {"content": rest}, piece))
        return [*made, self._event(choice, {}, finish="tool_calls" if calls else choice.finish)]

    def _event(
        self, choice: Choice, delta: Mapping[str, Any], piece: Piece | None = None, finish: str | None = None
    ) -> str:
        logprobs = self._logprobs(piece.tokens) if piece else None
        one = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event(self._chunk([one], None))

    def _chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        asked = self._asked.stream_options and self._asked.stream_options.include_usage
        return {**chunk, "usage": usage} if asked else chunk

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        texts = self._work.answerer.base.token_texts

        def told(id: int, logprob: float) -> dict[str, Any]:
            text, raw = texts(id)
            return {"token": text, "logprob": logprob, "bytes": raw}

        content = [
            {**told(token.id, token.logprob or 0.0), "top_logprobs": [told(*pair) for pair in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, Any]:
        return usage(len(self._work.prompt), self._running.answered, self._running.reused)


def usage(prompt: int, answered: int, reused: int) -> dict[str, Any]:
    """How many tokens a request took."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": reused, "audio_tokens": 0},
        "completion_tokens_details": {
            **{"reasoning_tokens": 0, "audio_tokens": 0},
            **{"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        },
    }
