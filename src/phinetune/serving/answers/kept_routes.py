"""Kept answers by the API: responses, chat completions with `store: true`, and what was said in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from phinetune.serving.answers.kept import CHAT, RESPONSE, KeptAnswers
from phinetune.serving.errors import ApiError
from phinetune.serving.job_request import Metadata, Parameters
from phinetune.serving.pages import metadata_conditions, page, piece
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row

After = Annotated[str | None, Query(max_length=128)]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


class Changed(Parameters):
    """What may be changed of a kept answer."""

    metadata: Metadata | None


def add_to(router: APIRouter, state: ServerState, kept: KeptAnswers) -> None:
    """Add the endpoints that find, change and forget answers."""
    _add_responses(router, kept)
    _add_chats(router, state, kept)


def _add_responses(router: APIRouter, kept: KeptAnswers) -> None:
    def find(id: str) -> Row:
        row = kept.find(RESPONSE, id)
        if row is None:
            raise ApiError(404, f"Response with id '{id}' not found.", param="response_id")
        return row

    @router.get("/responses/{response_id}")
    def retrieve_response(response_id: str, stream: bool = False) -> dict[str, Any]:
        """A response that was kept, whole."""
        row = find(response_id)
        if stream:
            raise ApiError(400, "A kept response comes whole here.", code="unsupported_parameter", param="stream")
        return dict(json.loads(row["body"]))

    @router.delete("/responses/{response_id}")
    def delete_response(response_id: str) -> dict[str, Any]:
        kept.delete(find(response_id))
        return {"id": response_id, "object": RESPONSE, "deleted": True}

    @router.get("/responses/{response_id}/input_items")
    def list_input_items(
        response_id: str, after: After = None, limit: Limit = 20, order: Order = "desc"
    ) -> dict[str, Any]:
        """The conversation before a response, that of earlier responses included."""
        said = json.loads(find(response_id)["messages"])[:-1]  # the last one is the response
        items = [_item(f"{response_id.replace('resp', 'msg', 1)}_{i}", one) for i, one in enumerate(said)]
        return piece(items, after=after, limit=limit, backwards=order == "desc")


def _add_chats(router: APIRouter, state: ServerState, kept: KeptAnswers) -> None:
    def find(id: str) -> Row:
        row = kept.find(CHAT, id)
        if row is None:
            message = f"No chat completion with id '{id}' was kept; ask for it with 'store': true."
            raise ApiError(404, message, param="completion_id")
        return row

    @router.get("/chat/completions")
    def list_chat_completions(
        request: Request,
        after: After = None,
        limit: Limit = 20,
        order: Order = "asc",
        model: Annotated[str | None, Query(max_length=512)] = None,
    ) -> dict[str, Any]:
        """The chat completions that were kept."""
        where, values = metadata_conditions(request, "body")
        where, values = ["kind = ?", *where], [CHAT, *values]
        if model:
            where, values = [*where, "model = ?"], [*values, model]
        return page(
            *(state.store, "answers", _body),
            after=after,
            limit=limit,
            where=where,
            values=values,
            oldest_first=order == "asc",
        )

    @router.get("/chat/completions/{completion_id}")
    def retrieve_chat_completion(completion_id: str) -> dict[str, Any]:
        return _body(find(completion_id))

    @router.post("/chat/completions/{completion_id}")
    def update_chat_completion(completion_id: str, changed: Changed) -> dict[str, Any]:
        """Give a kept chat completion other metadata."""
        return kept.change(find(completion_id), metadata=changed.metadata)

    @router.delete("/chat/completions/{completion_id}")
    def delete_chat_completion(completion_id: str) -> dict[str, Any]:
        kept.delete(find(completion_id))
        return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}

    @router.get("/chat/completions/{completion_id}/messages")
    def list_messages(
        completion_id: str, after: After = None, limit: Limit = 20, order: Order = "asc"
    ) -> dict[str, Any]:
        """The messages that a kept chat completion answers."""
        said = json.loads(find(completion_id)["messages"])
        items = [{"id": f"{completion_id}-{i}", **_message(one)} for i, one in enumerate(said)]
        return piece(items, after=after, limit=limit, backwards=order == "desc")


def _body(row: Row) -> dict[str, Any]:
    return dict(json.loads(row["body"]))


def _item(id: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as an item of a response."""
    kind = "output_text" if message["role"] == "assistant" else "input_text"
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    content = [{"type": kind, "text": message["content"], **more}]
    return {"id": id, "type": "message", "status": "completed", "role": message["role"], "content": content}


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the client sent it; parts stand apart."""
    content = given.get("content")
    parts = content if isinstance(content, list) else None
    return {**given, "content": None if parts else content, "content_parts": parts}
