"""What every request passes before anything else sees it: Host, Origin, key, size, and how many there are at once."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phinetune.serving.errors import INVALID, ApiError, too_many
from phinetune.serving.sessions import COOKIE, CSRF_HEADER, csrf_token, is_session, matches
from phinetune.serving.state import ServerState

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/healthz",)  # for whoever looks whether the server is there
LOOPBACK = ("localhost", "127.0.0.1", "::1")
UPLOAD = "/v1/files"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
DRAINED, DRAIN_S = 1 << 30, 10.0  # bytes and seconds that a body which is too large is read on
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Middleware around the whole app.

    Attributes:
        open_paths: paths that need no key. Of other paths, `open_prefixes` are for the page's own files.
    """

    def __init__(
        self, app: ASGIApp, state: ServerState, open_paths: tuple[str, ...] = (), open_prefixes: tuple[str, ...] = ()
    ) -> None:
        self.app, self.state = app, state
        self.open_paths, self.open_prefixes = (*OPEN_PATHS, *open_paths), open_prefixes
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and end; there are no web sockets
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else send({"type": "websocket.close"}))
            return
        answer = _Answer(send)
        began = time.perf_counter()
        try:
            self._check(scope)
            self._running += 1
            try:
                await self.app(scope, self._counted(scope, receive, answer), answer)
            finally:
                self._running -= 1
            if answer.instead:
                raise answer.instead
        except ApiError as error:
            await answer.refuse(error, scope, receive)
        except asyncio.CancelledError:  # the server's time to stop is over; the task ends here
            stopping = ApiError(503, "The server is stopping; try again.", "server_error", headers={"Retry-After": "5"})
            await answer.refuse(stopping, scope, receive)
        finally:
            self._record(scope, answer.status, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_host(headers)
        if not (path in self.open_paths or (self.open_prefixes and path.startswith(self.open_prefixes))):
            self._check_key(headers, scope["method"])
        if self._running >= self.state.settings.limits.requests:
            raise too_many(f"This server works on {self._running} requests already; try again.")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most(scope):
            raise _too_large(self._most(scope))

    def _check_host(self, headers: Headers) -> None:
        """Refuse what a page of another site sends: by a name that it made point here, or from its own origin."""
        host = headers.get("host", "")
        name = _name(host)
        if name not in LOOPBACK and name not in self._names() and not self._is_own_address(name):
            message = f"This server does not answer to the host {name!r}; see --allow-host."
            raise ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            raise ApiError(403, "Requests from pages of other sites are refused.", code="origin_not_allowed")

    def _names(self) -> tuple[str, ...]:
        return (self.state.settings.host.lower(), *(name.lower() for name in self.state.settings.hosts))

    def _is_own_address(self, name: str) -> bool:
        """Whether a client called by number. No name was looked up then, so nobody can have bent it."""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.state.settings.host not in LOOPBACK

    def _check_key(self, headers: Headers, method: str) -> None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and given:
            if matches(given.strip(), self.state.key):
                return
            message = "Incorrect API key provided. `phinetune serve` prints the key when it starts."
            raise ApiError(401, message, INVALID, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        cookie = _session(headers)
        if cookie and is_session(cookie, self.state.key):
            sealed = method in SAFE_METHODS or matches(headers.get(CSRF_HEADER, ""), csrf_token(cookie, self.state.key))
            if sealed:
                return
            message = "The page's token (X-CSRF-Token) is missing or wrong; load the page again."
            raise ApiError(403, message, code="csrf_failed")
        message = (
            "You didn't provide an API key. Provide it in an Authorization header using Bearer auth "
            "(i.e. Authorization: Bearer YOUR_KEY)."
        )
        raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})

    def _most(self, scope: Scope) -> int:
        limits = self.state.settings.limits
        is_upload = scope["method"] == "POST" and scope["path"].rstrip("/") == UPLOAD
        return limits.file + 64_000 if is_upload else limits.body  # a little for what stands around the file

    def _counted(self, scope: Scope, receive: Receive, answer: _Answer) -> Receive:
        """The request's body, refused where it is larger than it may be, whatever its headers said.

        What reads a body makes an error of its own of that, so the answer is told too.
        """
        most, read = self._most(scope), 0

        async def counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                answer.instead = _too_large(most)
                raise answer.instead
            return message

        return counting

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        operation = getattr(scope.get("endpoint"), "__name__", "none")
        labels = f'{{operation="{operation}",status="{status}"}}'
        self.state.count(f"phinetune_requests_total{labels}")
        self.state.count("phinetune_request_seconds_total", seconds)
        level = logging.DEBUG if scope["method"] in SAFE_METHODS and status < 400 else logging.INFO
        logger.log(level, "%s %s %d %.0f ms", scope["method"], scope["path"], status, 1000 * seconds)


class _Answer:
    """Passes an answer on, with headers of safety, and knows whether it has begun.

    Attributes:
        instead: an error that is told in place of an answer that has not begun.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.status, self._began = send, 500, False
        self.instead: ApiError | None = None

    async def __call__(self, message: Message) -> None:
        if self.instead and not self._began:
            return
        if message["type"] == "http.response.start":
            self._began, self.status = True, message["status"]
            present = {name.lower() for name, _ in message.get("headers", [])}
            more = [(name, value) for name, value in HEADERS if name not in present]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await self._send(message)

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if not self._began:
            self.instead = None
            answer: Any = error.answer()
            if error.status == 413:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_drain(receive), DRAIN_S)
            answer.headers["Connection"] = "close"
            await answer(scope, receive, self)


async def _drain(receive: Receive) -> None:
    """Read what is left of a body and forget it: a client that is still sending would not see the answer."""
    left, more = DRAINED, True
    while more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The request is larger than the {most:,} bytes that this server takes.", code="too_large")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _place(origin: str) -> str | None:
    """The name and port in an Origin header; None if it is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _session(headers: Headers) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None
