"""Asks an endpoint that speaks OpenAI's chat completions, with limits on time, tries and size; says what went wrong.

The key goes into one header of the request and nowhere else.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from phinetune.config.judge import JudgeMetric
from phinetune.errors import ConfigError, reason_of
from phinetune.secret_text import HIDDEN, without_secrets

FIRST_WAIT = 1.0  # seconds before a request is sent again; each wait is twice the one before
LONGEST_WAIT = 60.0  # even if the endpoint asks for more
LARGEST = 4 << 20  # bytes of a reply
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may be gone the next time
EXCERPT = 160  # letters of what the endpoint says


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Attributes:
        text: the model's answer; None if there is none.
        trouble: why there is none, in words.
        final: whether every other request would end the same way.
    """

    text: str | None
    trouble: str = ""
    final: bool = False


class _PassingError(Exception):
    """A failure that may be gone the next time. `wait`: seconds that the endpoint asks for, if it does."""

    def __init__(self, trouble: str, wait: float | None = None) -> None:
        super().__init__(trouble)
        self.wait = wait


def read_key(judge: JudgeMetric) -> str | None:
    """The judge's key; None if it needs none.

    Raises:
        ConfigError: the variable or the file that is to hold it does not, or it can't be sent.
    """
    where = f"evaluation.metrics: `{judge.name}`"
    if judge.key_env:
        key = os.environ.get(judge.key_env, "").strip()
        if not key:
            raise ConfigError(f"{where}: key_env: the environment variable {judge.key_env} is not set")
    elif judge.key_file:
        try:
            key = Path(judge.key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: key_file: {reason_of(error)}") from None
        if not key:
            raise ConfigError(f"{where}: key_file: {judge.key_file} is empty")
    else:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: its key has signs that no header can hold; it must be one line of ASCII")
    return key


class JudgeClient:
    """A connection to a judge. Several threads may ask at a time. Use it as a context, which closes it."""

    def __init__(self, judge: JudgeMetric, key: str | None) -> None:
        self.judge, self._key = judge, key
        self._stopped = threading.Event()
        # A proxy of the environment must not see what is said to stay on this machine. Redirects are not followed.
        self._client = httpx2.Client(timeout=judge.timeout, trust_env=not judge.is_here, follow_redirects=False)

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """Let no further request begin, and end all waiting."""
        self._stopped.set()

    def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """The model's answer to some messages; asked again after a failure that may pass."""
        wait, trouble = FIRST_WAIT, ""
        for left in range(self.judge.retries, -1, -1):
            if self._stopped.is_set():
                break
            try:
                return self._asked(messages)
            except _PassingError as error:
                trouble = str(error)
                if left and self._stopped.wait(min(LONGEST_WAIT, wait if error.wait is None else error.wait)):
                    break
                wait *= 2
        return Reply(None, trouble or "not asked, since the requests before it failed")

    def _asked(self, messages: Sequence[dict[str, str]]) -> Reply:
        body: dict[str, Any] = {"model": self.judge.model, "messages": list(messages)}
        for key in ("temperature", "max_tokens"):
            if getattr(self.judge, key) is not None:
                body[key] = getattr(self.judge, key)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            with self._client.stream("POST", self.judge.endpoint, json=body, headers=headers) as response:
                status, content = response.status_code, self._content(response)
                wait = _seconds(response.headers.get("retry-after"))
        except httpx2.TimeoutException:
            raise _PassingError(f"no answer within {self.judge.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise _PassingError(f"the connection failed ({self._said(reason_of(error))})") from None
        if status == 200:
            return _reply(content)
        trouble = self._trouble(status, content)
        if status in PASSING:
            raise _PassingError(trouble, wait)
        return Reply(None, trouble, final=status in (401, 403, 404) or 300 <= status < 400)

    def _content(self, response: httpx2.Response) -> bytes:
        """The reply's bytes, as far as time and size allow."""
        content, end = b"", time.monotonic() + self.judge.timeout
        for part in response.iter_bytes():
            content += part
            if time.monotonic() > end:
                raise _PassingError(f"no answer within {self.judge.timeout:g} s")
            if len(content) > LARGEST:
                break
        return content

    def _trouble(self, status: int, content: bytes) -> str:
        """What a status says, with the beginning of the endpoint's own words."""
        said = self._said(_message(content))
        excerpt = f": {said}" if said else ""
        if status in (401, 403):
            sent = "" if self._key else "; none was sent, so name it in `key_env` or `key_file`"
            return f"the key was refused ({status}){sent}"
        if status == 404:
            return f"there is no such address or model ({status}){excerpt}"
        if status == 429:
            return f"too many requests ({status}){excerpt}"
        if 300 <= status < 400:
            return f"it points to another address ({status}), which is not followed"
        kind = "the endpoint failed" if status >= 500 else "the request was refused"
        return f"{kind} ({status}){excerpt}"

    def _said(self, text: str) -> str:
        """Words from outside in one short line, without the key, which some endpoints repeat."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, HIDDEN)
        line = without_secrets(line)
        return line if len(line) <= EXCERPT else f"{line[:EXCERPT]} …"


def _seconds(value: str | None) -> float | None:
    """The header Retry-After; its form with a date is left to the usual wait."""
    return float(value) if value and value.strip().isdigit() else None


def _message(content: bytes) -> str:
    """What an endpoint says of an error: OpenAI's form, FastAPI's, or the text itself."""
    text = content[:LARGEST].decode("utf-8", "replace")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = tree.get("error", tree.get("detail", tree)) if isinstance(tree, dict) else tree
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _reply(content: bytes) -> Reply:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError):
        return Reply(None, "the reply is no chat completion")
    return Reply(text) if isinstance(text, str) else Reply(None, "the reply has no text")
