"""Sessions of the page: a cookie that stands for the key, and a token without which the cookie changes nothing."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

COOKIE = "phinetune_session"
CSRF_HEADER = "x-csrf-token"
LIFETIME_S = 30 * 24 * 3600


def matches(given: str, key: str) -> bool:
    """Whether a client knows the key. The time that this takes tells nothing of it."""
    return hmac.compare_digest(given.encode(), key.encode())


def new_session(key: str) -> str:
    """The value of a new session's cookie: its end, a random number, and a seal that needs the key."""
    body = f"{int(time.time()) + LIFETIME_S}.{secrets.token_urlsafe(16)}"
    return f"{body}.{_seal(key, 'session', body)}"


def is_session(cookie: str, key: str) -> bool:
    """Whether this server made a cookie, and its time is not over."""
    body, _, seal = cookie.rpartition(".")
    ends = body.partition(".")[0]
    return matches(seal, _seal(key, "session", body)) and ends.isdecimal() and int(ends) > time.time()


def csrf_token(cookie: str, key: str) -> str:
    """The token that a page of this session sends in the header `X-CSRF-Token`."""
    return _seal(key, "csrf", cookie)


def cookie_header(session: str) -> str:
    """The header that sets the cookie: scripts can't read it, and other sites' pages don't send it."""
    return f"{COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={LIFETIME_S}"


def end_header() -> str:
    """The header that lets a browser forget the cookie."""
    return f"{COOKIE}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0"


def _seal(key: str, use: str, text: str) -> str:
    return hmac.new(key.encode(), f"{use}\n{text}".encode(), hashlib.sha256).hexdigest()
