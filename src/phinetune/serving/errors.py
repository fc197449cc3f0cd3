"""Errors in the form of OpenAI's API, and what becomes of all others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"


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


def invalid_values(problems: Sequence[Any]) -> ApiError:
    """The error for parameters that are missing, unknown or of a wrong kind.

    Args:
        problems: pydantic's, at least one.
    """
    if problems[0]["type"] == "json_invalid":
        return ApiError(400, f"We could not parse the JSON body of your request: {problems[0]['msg']}.")
    told = dict.fromkeys(_told(one) for one in problems)
    kind = problems[0]["type"]
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(kind, "invalid_value")
    return ApiError(400, " ".join(told), code=code, param=_place(problems[0]["loc"]) or None)


def _told(problem: Any) -> str:
    place = _place(problem["loc"])
    if problem["type"] == "missing":
        return f"Missing required parameter: '{place}'."
    if problem["type"] == "extra_forbidden":
        return f"Unknown parameter: '{place}'."
    text = str(problem["msg"]).removeprefix("Value error, ")
    return f"Invalid '{place}': {text}." if place else f"{text}."


def _place(loc: Sequence[Any]) -> str:
    """A value's place as `method.dpo.beta`, without the part of the request that it stands in."""
    return ".".join(str(part) for part in loc if part not in ("body", "query", "path", "header"))


def _http_message(request: Request, error: Any) -> str:
    if error.status_code == 404:
        return f"Invalid URL ({request.method} {request.url.path})"
    if error.status_code == 405:
        return f"Not allowed to {request.method} on {request.url.path}"
    return str(error.detail)
