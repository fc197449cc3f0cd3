"""What clients ask and models answer, in the log: only where whoever started the server wants it there."""

from __future__ import annotations

import json
import logging
from typing import Any

from phinetune.secret_text import without_secrets
from phinetune.serving.answers.running import Running
from phinetune.terminal_text import printable

logger = logging.getLogger(__name__)


class ContentLog:
    """Writes a line for each request and one for its answers, or nothing at all."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def follow(self, running: Running, id: str, model: str, asked: Any) -> None:
        """Log what was asked now, and the answers when they have ended.

        Args:
            id: of the answer, which both lines have.
            asked: as the client sent it.
        """
        if self._wanted:
            logger.info("%s asks %s: %s", id, model, _line(asked))
            running.when_ended = lambda texts: logger.info("%s answers: %s", id, _line(texts))


def _line(content: Any) -> str:
    """A tree of JSON as one line, without access tokens."""
    return printable(without_secrets(json.dumps(content, ensure_ascii=False)))
