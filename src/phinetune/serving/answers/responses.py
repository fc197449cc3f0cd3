"""`/v1/responses`: text in, text out, with the typed events of a stream. A response may go on from an earlier one."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phinetune.chats.template import Message
from phinetune.engine.continuous.requests import Constraint, Request
from phinetune.serving.answers.answerer import Answerer
from phinetune.serving.answers.content_log import ContentLog
from phinetune.serving.answers.forms import ResponseAsked
from phinetune.serving.answers.kept import RESPONSE, KeptAnswers
from phinetune.serving.answers.preparing import Find, Preparing
from phinetune.serving.answers.prompts import chat_ids, read_messages
from phinetune.serving.answers.running import Running, answer_room
from phinetune.serving.answers.sse import ended_with_client, event, stream
from phinetune.serving.answers.texts import AnswerText, Decoder
from phinetune.serving.errors import ApiError

if TYPE_CHECKING:
    from fastapi import APIRouter

    from phinetune.serving.state import ServerState


def add_to(router: APIRouter, state: ServerState, preparing: Preparing, kept: KeptAnswers) -> None:
    """Add the endpoint."""
    from fastapi import Request as HttpRequest

    contents = ContentLog(state.settings.log_contents)

    async def create(asked: ResponseAsked, http: HttpRequest) -> Any:
        asked.check()
        work = await preparing.do(lambda find: _prepare(asked, find, kept))
        running = Running(work.answerer, [work.request], [AnswerText(Decoder(work.answerer.tokenizer))])
        state.count('phinetune_answers_total{endpoint="responses"}')
        reply = _Reply(asked, work, running, kept)
        contents.follow(running, reply.id, asked.model, {"instructions": asked.instructions, "input": asked.input})
        if asked.stream:
            return stream(running, reply.events())
        async with ended_with_client(http, running):
            return await reply.whole()

    create.__annotations__ |= {"asked": ResponseAsked, "http": HttpRequest}
    router.post("/responses", response_model=None, summary="Answer, in the form of OpenAI's newer API")(create)


@dataclass(frozen=True)
class _Work:
    """A request, ready for the engine.

    Attributes:
        messages: the conversation so far, without instructions, which hold for this response alone.
    """

    answerer: Answerer
    messages: list[Message]
    request: Request


def _prepare(asked: ResponseAsked, find: Find, kept: KeptAnswers) -> _Work:
    given: Any = asked.input
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    for i, item in enumerate(items):
        if item.get("type", "message") != "message":
            raise ApiError(
                400, f"'input[{i}]' is of type {item['type']!r}: this server reads messages alone.",
                code="invalid_value", param=f"input[{i}].type",
            )  # fmt: skip
    earlier = _earlier(kept, asked.previous_response_id) if asked.previous_response_id else []
    messages = [*earlier, *read_messages(items, "input")]
    if not messages:
        raise ApiError(400, "'input' is empty.", code="invalid_value", param="input")
    head: list[Message] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    answerer = find(asked.model)
    prompt = chat_ids(answerer, [*head, *messages])
    request = Request(
        prompt,
        answer_room(answerer, prompt, asked.max_output_tokens),
        adapter=answerer.adapter,
        stops=answerer.base.stops,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        constraint=_constraint(asked, answerer),
    )
    return _Work(answerer, messages, request)


def _earlier(kept: KeptAnswers, id: str) -> list[Message]:
    """The conversation that a response goes on from.

    Raises:
        ApiError: it is not known, or forgotten.
    """
    row = kept.find(RESPONSE, id)
    if row is None:
        raise ApiError(
            400, f"Previous response with id '{id}' not found.", code="previous_response_not_found",
            param="previous_response_id",
        )  # fmt: skip
    return list(json.loads(row["messages"]))


def _constraint(asked: ResponseAsked, answerer: Answerer) -> Callable[[], Constraint] | None:
    form = asked.text.format if asked.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.schema_ is None:
        raise ApiError(
            400, "Missing required parameter: 'text.format.schema'.", code="missing_required_parameter",
            param="text.format.schema",
        )  # fmt: skip
    schema = form.schema_ if form.type == "json_schema" else {"type": "object"}
    return answerer.base.grammars.json(schema or {}, "text.format.schema")


class _Reply:
    """One response in the API's form."""

    def __init__(self, asked: ResponseAsked, work: _Work, running: Running, kept: KeptAnswers) -> None:
        self._asked, self._work, self._running, self._kept = asked, work, running, kept
        self.id, self._item = f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        text = ""
        async for piece in self._running.pieces():
            text += piece.text
        return await self._ended(text)

    async def events(self) -> AsyncIterator[str]:
        """The events of a stream, in the API's order."""
        begun = self._response("in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", None))
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **place, part=_part(""))
        text = ""
        try:
            async for piece in self._running.pieces():
                text += piece.text
                if piece.text:
                    yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        except ApiError as error:
            failed = {"code": "server_error", "message": error.message}
            yield self._event("response.failed", response={**self._response("failed", []), "error": failed})
            return
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(text))
        ended = await self._ended(text)
        yield self._event("response.output_item.done", output_index=0, item=ended["output"][0])
        yield self._event(f"response.{ended['status']}", response=ended)

    def _event(self, kind: str, **values: Any) -> str:
        made = event({"type": kind, "sequence_number": self._number, **values}, kind)
        self._number += 1
        return made

    async def _ended(self, text: str) -> dict[str, Any]:
        """The whole response; what it said is kept for a next one."""
        cut = self._running.choices[0].finish == "length"
        status = "incomplete" if cut else "completed"
        made = self._response(status, [self._message(status, text)])
        if cut:
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        prompt, answered = len(self._work.request.prompt), self._running.answered
        made["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self._running.reused, "cache_write_tokens": 0},
            "output_tokens": answered,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answered,
        }
        if self._asked.store is not False:
            said = [*self._work.messages, {"role": "assistant", "content": text}]
            await asyncio.to_thread(self._kept.put, RESPONSE, made, said)
        return made

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[Mapping[str, Any]]) -> dict[str, Any]:
        asked = self._asked
        form = asked.text.format if asked.text else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": asked.previous_response_id,
            "store": asked.store is not False,
            "temperature": self._work.request.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": self._work.request.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
