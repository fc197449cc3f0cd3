"""Renders pages. A page is one HTML file that holds its styles, scripts and data.

Its Content-Security-Policy lets the browser load nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from phinetune.files import write_text
from phinetune.metric_table import LESS_TOLD
from phinetune.reporting import run_comparison as comparing
from phinetune.reporting import tuned, views
from phinetune.reporting.curves import charts
from phinetune.reporting.facts import RunFacts, read_run, read_runs
from phinetune.reporting.headline import headline
from phinetune.run_folder import REPORT, RunFolder
from phinetune.version import VERSION

PAGE = Path(str(files("phinetune.reporting"))) / "page"
STYLES = ("uplot/uPlot.min.css", "style.css")
SCRIPTS = ("uplot/uPlot.iife.min.js", "plots.js")
LIVE_SCRIPT = "live.js"


def write_report(path: str | Path, out: Path | None = None) -> Path:
    """Write a run's page into its folder, or to `out`.

    Returns:
        the file that was written.

    Raises:
        RunError: there is no run at `path`.
    """
    run = read_run(path)
    target = out or run.path / REPORT
    write_text(target, run_page(run), private=True)
    return target


def write_comparison(paths: Sequence[str | Path], out: Path) -> Path:
    """Write a page that compares runs to `out`.

    Raises:
        RunError: there is no run at one of the paths.
    """
    write_text(out, comparison_page(read_runs(paths)), private=True)
    return out


def run_page(run: RunFacts, live: bool = False) -> str:
    """The HTML page of one run. A live page asks its server for a new version every two seconds."""
    return render_page(
        "run.html", live=live, run=run, headline=headline(run), charts=charts([run]), views=views, tuned=tuned
    )


def write_tuned(folder: Path) -> Path:
    """Write the page of a race into its folder, from the tune.json there."""
    tree = RunFolder(folder).read_tuned()
    target = folder / REPORT
    page = render_page("tune.html", name=folder.name, headline=tuned.headline(tree), tree=tree, tuned=tuned, charts=[])
    write_text(target, page, private=True)
    return target


def comparison_page(runs: Sequence[RunFacts]) -> str:
    """The HTML page that compares runs."""
    return render_page(
        "comparison.html",
        runs=runs,
        headline=comparing.headline(runs),
        charts=charts(runs),
        comparing=comparing,
        views=views,
    )


def render_page(template: str, *, live: bool = False, **values: Any) -> str:
    """A page from one of the templates, with styles, scripts and policy."""
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    styles = [_read(name) for name in STYLES]
    scripts = [_read(name) for name in (*SCRIPTS, *([LIVE_SCRIPT] if live else []))]
    return environment.get_template(template).render(
        **values,
        live=live,
        version=VERSION,
        less_told=LESS_TOLD,
        written=time.strftime("%Y-%m-%d %H:%M"),
        policy=_policy(styles, scripts, live),
        styles=[Markup(style) for style in styles],
        scripts=[Markup(script) for script in scripts],
    )


def _policy(styles: Sequence[str], scripts: Sequence[str], live: bool) -> str:
    """The Content-Security-Policy. It allows only these styles and scripts, which it names by their hashes.

    The page can fetch nothing, except that a live page may ask its own server.
    """
    return "; ".join(
        [
            "default-src 'none'",
            "script-src " + " ".join(map(_hash, scripts)),
            "style-src " + " ".join(map(_hash, styles)),
            "img-src data:",
            *(["connect-src 'self'"] if live else []),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
