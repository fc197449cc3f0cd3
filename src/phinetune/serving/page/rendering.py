"""Makes HTML of the page's templates, and knows who may see it."""

from __future__ import annotations

import time
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from phinetune.exporting.output_paths import readable_size
from phinetune.serving import sessions
from phinetune.serving.page.words import COOKIE, NAMES, Words, pick_language, words_of
from phinetune.serving.state import ServerState
from phinetune.terminal_text import visible
from phinetune.version import VERSION

OWN = Path(str(files("phinetune.serving.page")))
REPORT = Path(str(files("phinetune.reporting"))) / "page"
# The page's files come from this server, and it sends nothing elsewhere. No script or style stands in the HTML.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)


def words_for(request: Request) -> Words:
    """The words of the language that a browser wants."""
    return words_of(pick_language(request.cookies.get(COOKIE), request.headers.get("accept-language")))


def session_of(request: Request, state: ServerState) -> str | None:
    """The session's cookie, if this server made it and its time is not over."""
    cookie = request.cookies.get(sessions.COOKIE)
    return cookie if cookie and sessions.is_session(cookie, state.key) else None


def whole_page(request: Request, state: ServerState, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A whole page."""
    session = session_of(request, state)
    csrf = sessions.csrf_token(session, state.key) if session else ""
    text = _render(template, words_for(request), csrf=csrf, signed_in=bool(session), path=request.url.path, **values)
    return HTMLResponse(text, status, headers={"Content-Security-Policy": POLICY})


def piece(request: Request, template: str, **values: Any) -> HTMLResponse:
    """A piece of a page, which takes the place of an older one."""
    return HTMLResponse(_render(template, words_for(request), **values), headers={"Content-Security-Policy": POLICY})


def _render(template: str, words: Words, **values: Any) -> str:
    return environment().get_template(template).render(
        **values, t=words, languages=NAMES, version=VERSION, now=int(time.time())
    )  # fmt: skip


@cache
def environment() -> Environment:
    """The templates. What a file or a model says is escaped wherever it stands."""
    made = Environment(
        loader=FileSystemLoader(OWN / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(size=readable_size, count=lambda number: f"{number:,}", token=_token, clock=_clock)
    return made


def _token(text: str) -> str:
    """A token's text with a sign for what is not seen."""
    return visible(text).replace("\n", "↵\n")


def _clock(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
