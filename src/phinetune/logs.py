"""Sets up logging: with times, a level of the user's choice, and a copy of the lines in the run's folder."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phinetune.files import disk_trouble
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


class RunLog(logging.FileHandler):
    """Writes log lines to a file. What the disk refuses is told once, and the program goes on without those lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(SafeFormatter())
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say what the disk reports. Any other error is shown as logging shows it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        else:
            self._tell(error)

    def close(self) -> None:
        """Close the file; lines that can't be written any more are given up."""
        try:
            super().close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            why = disk_trouble(error) or str(error)
            print(f"{self.baseFilename}: {why}; lines of this log are missing", file=sys.stderr)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """A context in which phinetune's log lines, from INFO on, are also written to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)  # for the user alone: a row or an answer may stand in it
    handler = RunLog(path)
    logger = logging.getLogger("phinetune")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
