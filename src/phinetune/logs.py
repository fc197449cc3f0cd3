"""Sets up logging: with times, a level of the user's choice, and a copy of the lines in the run's folder."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phinetune.secret_text import without_secrets
from phinetune.terminal_text import visible

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
DATES = "%Y-%m-%d %H:%M:%S"
LEVELS = ("debug", "info", "warning", "error", "critical")


class SafeFormatter(logging.Formatter):
    """Writes a line so that nothing in it acts on a terminal, and no access token is told."""

    def __init__(self) -> None:
        super().__init__(FORMAT, DATES)

    def format(self, record: logging.LogRecord) -> str:
        """The line, with its traceback if it has one."""
        return visible(without_secrets(super().format(record)), "\n\t")


def set_up_logging(level: str = "info") -> None:
    """Show phinetune's log lines from this level on, on standard error.

    Other libraries' lines are shown from the same level on, but never below warnings. If the program already has
    handlers, no handler is added.
    """
    number = getattr(logging, level.upper())
    logging.getLogger("phinetune").setLevel(min(number, logging.INFO))
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter())
    handler.setLevel(number)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(max(number, logging.WARNING))


def quiet_libraries() -> None:
    """Turn off other libraries' progress bars and notices. Errors are still shown, and so are most warnings."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl|peft|torch)")
    warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")  # one line says so, not one for each layer


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """A context in which phinetune's log lines, from INFO on, are also written to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)  # for the user alone: a row or an answer may stand in it
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(SafeFormatter())
    logger = logging.getLogger("phinetune")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
