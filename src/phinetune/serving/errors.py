"""Errors in the form of OpenAI's API, and what becomes of all others."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.config.section import joined_message
from phinetune.errors import PhinetuneError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
UNKNOWN = "Unknown parameter: '{}'."
PARTS = ("body", "query", "path", "header", "cookie")  # of a request; pydantic's places begin with them
# What pydantic calls the kinds of a value that may be of several, and adds to its place.
KINDS = ("literal[", "constrained-", "function-", "list[", "dict[")
PLAIN_KINDS = ("str", "int", "float", "bool", "none")


class ApiError(Exception):
    """An error that a client gets as `{"error": {"message", "type", "param", "code"}}`.

    Attributes:
        status: of HTTP.
        type, code, param: as OpenAI's API has them.
        headers: more headers of the answer, such as `Retry-After`.
        details: more keys of the error, which OpenAI's API does not have.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.headers, self.details = dict(headers or {}), dict(details or {})

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        shown = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**shown, **self.details}}

    def answer(self) -> JSONResponse:
        """The answer as a whole."""
        from fastapi.responses import JSONResponse

        return JSONResponse(self.body(), self.status, headers=self.headers)


def too_many(message: str, retry_after_s: int = 1) -> ApiError:
    """The error for a client that has to wait."""
    return ApiError(
        429, message, "requests", "rate_limit_exceeded", headers={"Retry-After": str(max(1, retry_after_s))}
    )


def cant_look(fault: PhinetuneError, folder: Path) -> ApiError:
    """The error for a file or a job that this server can't look at now, whatever is in it.

    Args:
        folder: the server's, whose place is nothing to a client.
    """
    logger.warning("a file or a job can't be looked at: %s", fault)
    told = "; ".join(fault.problems[:20]).replace(f"{folder}{os.sep}", "")
    return ApiError(503, f"This server can't look at it now: {told}", "server_error", "cant_look")


def add_handlers(app: FastAPI) -> None:
    """Let every error of an app leave in the API's form. What is unexpected is logged and told as a 500."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(ApiError)
    async def _known(request: Request, error: ApiError) -> JSONResponse:
        return error.answer()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        made = ApiError(error.status_code, _http_message(request, error), headers=error.headers)
        return made.answer()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_values(error.errors()).answer()

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "The server had an error; its log says which.", "server_error").answer()


def unknown_parameter(place: str) -> ApiError:
    """The error for a parameter that the API does not have."""
    return ApiError(400, UNKNOWN.format(place), code="unknown_parameter", param=place)


def invalid_values(problems: Sequence[Any]) -> ApiError:
    """The error for parameters that are missing, unknown or of a wrong kind.

    Args:
        problems: pydantic's, at least one.
    """
    if problems[0]["type"] == "json_invalid":
        return ApiError(400, f"We could not parse the JSON body of your request: {problems[0]['msg']}.")
    by_place: dict[str, list[Any]] = {}
    for one in problems:
        by_place.setdefault(_place(one["loc"]), []).append(one)
    place, first = next(iter(by_place.items()))
    codes = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    message = " ".join(_told(name, found) for name, found in by_place.items())
    return ApiError(400, message, code=codes.get(first[0]["type"], "invalid_value"), param=place or None)


def _told(place: str, problems: Sequence[Any]) -> str:
    """The sentence for what is wrong at one place; pydantic has a problem for each kind that a value may be of."""
    if problems[0]["type"] == "missing":
        return f"Missing required parameter: '{place}'."
    if problems[0]["type"] == "extra_forbidden":
        return UNKNOWN.format(place)
    text = joined_message([one["msg"] for one in problems])
    return f"Invalid '{place}': {text}." if place else f"{text}."


def _place(loc: Sequence[Any]) -> str:
    """A value's place as `method.dpo.beta`, without the part of the request and the kinds that pydantic names in it."""
    inside = loc[1:] if loc and loc[0] in PARTS else loc
    return ".".join(str(part) for part in inside if not str(part).startswith(KINDS) and part not in PLAIN_KINDS)


def _http_message(request: Request, error: Any) -> str:
    if error.status_code == 404:
        return f"Invalid URL ({request.method} {request.url.path})"
    if error.status_code == 405:
        return f"Not allowed to {request.method} on {request.url.path}"
    return str(error.detail)
