"""What every JSON body has to be, whatever it is for: a tree of texts that can be written as UTF-8."""

from __future__ import annotations

import json

from fastapi import Request
from starlette.requests import ClientDisconnect

from phinetune.serving.errors import ApiError


async def check_body(request: Request) -> None:
    """Refuse a JSON body that could be read but not written again: into an answer, the database, a process.

    Raises:
        ApiError: a text holds half of a surrogate pair, or values stand too deep within one another.
    """
    if "json" not in request.headers.get("content-type", ""):
        return
    try:
        tree = await request.json()
    except (ValueError, RecursionError, ClientDisconnect):
        return  # whoever needs the body says what is wrong with it
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _refused("a text holds half of a surrogate pair (\\ud800 to \\udfff), which is no sign") from None
    except RecursionError:
        raise _refused("values stand too deep within one another") from None


def _refused(problem: str) -> ApiError:
    return ApiError(400, f"We could not parse the JSON body of your request: {problem}.", code="invalid_value")
