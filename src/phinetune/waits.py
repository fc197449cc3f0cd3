"""Tells of a wait that comes once on a machine, so that nobody takes a first command for one that hangs."""

from __future__ import annotations

import logging
import sys


def tell_wait(logger: logging.Logger, sentence: str) -> None:
    """Log the sentence. Where nothing shows log lines, as in `phinetune plan`, print it to standard error."""
    logger.info(sentence)
    if not logger.hasHandlers():
        print(sentence, file=sys.stderr)
