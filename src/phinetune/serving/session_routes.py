"""The way from the key to a session, for the page."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from phinetune.serving.errors import ApiError
from phinetune.serving.job_request import Parameters
from phinetune.serving.sessions import cookie_header, csrf_token, end_header, matches, new_session
from phinetune.serving.state import ServerState


class Knows(Parameters):
    """The body of a request for a session."""

    key: Annotated[str, Field(max_length=512)]


def router(state: ServerState) -> APIRouter:
    """`/session`: the key in exchange for a cookie and the token that goes with it."""
    made = APIRouter(tags=["session"])

    @made.post("/session")
    def begin(request: Knows) -> JSONResponse:
        if not matches(request.key, state.key):
            raise ApiError(401, "Incorrect key. `phinetune serve` prints it when it starts.", code="invalid_api_key")
        session = new_session(state.key)
        token = {"object": "session", "csrf_token": csrf_token(session, state.key)}
        return JSONResponse(token, headers={"Set-Cookie": cookie_header(session)})

    @made.delete("/session", status_code=204)
    def end() -> Response:
        """Let this browser forget its session."""
        return Response(status_code=204, headers={"Set-Cookie": end_header()})

    return made
