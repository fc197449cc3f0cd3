"""The page as a file: whole, sealed, escaped, and never the end of a run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from helpers import tiny_config
from phinetune.api import train as api
from phinetune.reporting import render as page
from phinetune.reporting.facts import RunFacts, read_run
from phinetune.run_folder import RunFolder
from reporting.report_helpers import BASE, EVALUATION, example, make_run

EVIL = "</script><script>alert(1)</script><b onclick=x>&amp;"
ROOT = Path(__file__).resolve().parents[2]


class Parts(HTMLParser):
    """Tags with their attributes, and what stands in scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem and self.tags[-1][1].get("type") != "application/json":
            self.inline.append((self.cdata_elem, data))


def source_hash(code: str) -> str:
    """A script's or style's hash, as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def test_nothing_is_loaded_and_only_the_pages_own_code_is_allowed(tmp_path: Path) -> None:
    text = page.run_page(read_run(make_run(tmp_path / "run")))
    parts = Parts(text)
    assert [tag for tag, attributes in parts.tags if {"src", "srcset", "style"} & attributes.keys()] == []
    links = [a["href"] or "" for tag, a in parts.tags if "href" in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    policy = next(a["content"] or "" for _, a in parts.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    assert len(parts.inline) == 4
    assert [f"{kind}: {code[:60]}" for kind, code in parts.inline if source_hash(code) not in policy] == []
    assert "connect-src" in page.run_page(read_run(tmp_path / "run"), live=True)


@pytest.mark.parametrize(
    "render",
    [
        pytest.param(page.run_page, id="run"),
        pytest.param(lambda run: page.comparison_page([run, run]), id="comparison"),
    ],
)
def test_what_models_and_folders_say_is_escaped(tmp_path: Path, render: Callable[[RunFacts], str]) -> None:
    evil = {"base": EVIL, "tuned": EVIL + "!", EVIL: "x"}
    examples = [example(prompt=EVIL, reference=EVIL, answers=evil)]
    folder = make_run(tmp_path / "<script>x", examples=examples, evaluation={EVIL: BASE, "tuned": BASE}, flags=[EVIL])
    text = render(read_run(folder))
    scripts = [a for tag, a in Parts(text).tags if tag == "script"]
    assert len(scripts) == 3
    assert "<b onclick" not in text
    charts = re.search('<script id="charts" type="application/json">(.*?)</script>', text)
    assert charts
    assert json.loads(charts[1])[0]["series"][0]["name"] == "<script>x"


@pytest.mark.parametrize("steps", [0, 1, 12])
def test_an_unfinished_run_has_a_page(tmp_path: Path, steps: int) -> None:
    text = page.write_report(make_run(tmp_path / "run", steps, finished=False)).read_text()
    assert f"stopped at step {steps} of 30" in text
    assert "phinetune train" in text
    assert "train.jsonl" in text


def test_a_run_that_recorded_next_to_nothing_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(tiny_config(Path("c.jsonl"), folder.path), None)
    page.write_report(folder.path)
    folder.write_results({})
    page.write_report(folder.path)
    folder.write_results({"evaluation": {"base": BASE}, "examples": [{}]})
    assert "2.5000" in page.write_report(folder.path).read_text()


def test_twenty_answers_are_shown_and_the_later_evaluation_beside_the_runs_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    RunFolder(folder).write_evaluation({"data": {"held_out": {"source": "other.jsonl"}}, "evaluation": EVALUATION})
    text = page.write_report(folder).read_text()
    assert text.count('<div class="side base">') == 20
    assert "Evaluated since, on other.jsonl" in text
    assert "Answers while training" in text


ALIKE = example()
UNLIKE = example(answers={"base": "The order is a classic example.", "tuned": "Sorry! We are on it."})


@pytest.mark.parametrize(
    ("examples", "compared_with"),
    [
        pytest.param([ALIKE, UNLIKE, ALIKE], "other", id="most answers are alike"),
        pytest.param([UNLIKE, ALIKE, UNLIKE], "reference", id="most answers are unlike"),
    ],
)
def test_unlike_answers_are_compared_with_the_reference(
    tmp_path: Path, examples: Sequence[object], compared_with: str
) -> None:
    text = page.run_page(read_run(make_run(tmp_path / "run", examples=examples)))
    assert f'id="marks-{compared_with}" checked' in text
    assert text.count(" checked>") == 1


def test_training_writes_the_page_and_the_run_outlives_its_failure(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    api.train_config(config, Console(quiet=True))
    assert "held-out chats" in (tmp_path / "run" / "report.html").read_text()

    def fail(path: Path) -> Path:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("phinetune.api.report.write_report", fail)
    api.train_config(config, Console(quiet=True), overwrite=True)
    assert (tmp_path / "run" / "results.json").is_file()
    assert not (tmp_path / "run" / "report.html").exists()
    assert "report.html was not written: a bug" in caplog.text


def test_the_vendored_library_is_what_it_says_and_cannot_end_its_script(tmp_path: Path) -> None:
    script = (page.PAGE / "uplot" / "uPlot.iife.min.js").read_text()
    version = script.partition("(v")[2].partition(")")[0]
    assert f"# uPlot {version}" in (page.PAGE / "uplot" / "README.md").read_text()
    assert f"uPlot {version} (MIT)" in page.run_page(read_run(make_run(tmp_path / "run")))
    assert "MIT" in (page.PAGE / "uplot" / "LICENSE").read_text()
    files = {name: (page.PAGE / name).read_text() for name in (*page.SCRIPTS, page.LIVE_SCRIPT, *page.STYLES)}
    assert [name for name, text in files.items() if re.search("</(script|style)|<!--", text, re.IGNORECASE)] == []


def test_the_wheel_holds_every_file_of_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run([*command, "-w", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [file for file in page.PAGE.rglob("*") if file.is_file()]
    assert {f"phinetune/reporting/page/{file.relative_to(page.PAGE).as_posix()}" for file in files} <= held
