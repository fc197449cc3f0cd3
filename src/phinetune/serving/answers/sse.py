"""Server-sent events, and what becomes of answers whose client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from phinetune.serving.answers.running import Running
from phinetune.serving.errors import ApiError

if TYPE_CHECKING:
    from fastapi import Request
    from fastapi.responses import StreamingResponse

DONE = "data: [DONE]\n\n"


def event(body: Mapping[str, Any], name: str | None = None) -> str:
    """One event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def stream(running: Running, events: AsyncIterator[str]) -> StreamingResponse:
    """A response of events. Answers end when the client goes; an error after the beginning is an event, too."""
    from fastapi.responses import StreamingResponse

    async def sent() -> AsyncIterator[str]:
        try:
            async for one in events:
                yield one
        except ApiError as error:
            yield event(error.body())
        finally:
            running.cancel()

    return StreamingResponse(sent(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@contextlib.asynccontextmanager
async def ended_with_client(request: Request, running: Running) -> AsyncIterator[None]:
    """A context in which the answers end when the client goes before they are complete."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        running.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        running.cancel()
