"""`report` and `watch`: the page of a run, or one that compares several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from phinetune.errors import PhinetuneError
from phinetune.reporting import watch as server
from phinetune.reporting.render import write_comparison, write_report
from phinetune.run_folder import REPORT, RunFolder

logger = logging.getLogger(__name__)

COMPARISON = "comparison.html"


def report(runs: str | Path | Sequence[str | Path], out: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the page of a run, or one that compares several: a single HTML file that loads nothing.

    Args:
        runs: a run, or several.
        out: the file to write. If left out, report.html in the run, or for several runs comparison.html here.
        overwrite: replace the file `out`.

    Raises:
        PhinetuneError: no run there, or the file is taken.
    """
    listed = [runs] if isinstance(runs, (str, Path)) else list(runs)
    target = Path(out) if out else Path(COMPARISON) if len(listed) > 1 else None
    if target and target.is_dir():
        raise PhinetuneError(f"{target} is a folder; give --out the name of a file")
    if target and target.exists() and not overwrite:
        raise PhinetuneError(f"{target} is there already; name another file with --out, or replace it with --overwrite")
    return write_comparison(listed, target) if target and len(listed) > 1 else write_report(listed[0], target)


def watch(run: str | Path, port: int = 8420, say: Callable[[str], None] = print) -> None:
    """Serve the page of a run on this machine, renewed as it trains, until Ctrl-C.

    Args:
        port: of 127.0.0.1; 0 is any that is free.
        say: is given a line at the beginning and one at the end.

    Raises:
        PhinetuneError: no run there, or the port can't be had.
    """
    server.watch(run, port, say)


def write_page(folder: RunFolder) -> Path | None:
    """Write report.html; whatever goes wrong there is said in a line, since a run must not be lost over its page."""
    try:
        return write_report(folder.path)
    except Exception as error:
        logger.warning("%s was not written: %s; `phinetune report %s` tries again", REPORT, error, folder.path)
        return None
