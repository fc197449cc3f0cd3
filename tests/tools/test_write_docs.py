"""What of docs/ is made is as the program is now, in both languages; the support matrix names tests that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import write_docs
from doc_pages import config_parts, support_parts, words
from doc_pages.filling import DOCS, filled

from phinetune.config.run import describe_config
from support_recorder import SupportRecorder

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_made_is_up_to_date_and_has_its_chinese() -> None:
    """If this fails: `python tools/write_docs.py`. It names sentences that have no Chinese."""
    late = [str(file.relative_to(ROOT)) for file in write_docs.behind()]
    assert (late, words.missing) == ([], set())


def test_every_key_stands_in_the_reference() -> None:
    text = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    keys = [key for key, _, _ in describe_config()]
    keys += list(config_parts.CustomMetric.model_fields) + list(config_parts.JudgeMetric.model_fields)
    assert [key for key in keys if f"`{key}`" not in text] == []


def test_a_part_is_filled_and_what_people_wrote_stays() -> None:
    page = "# Mine\n\n<!-- made: one -->\nold\n<!-- end of one -->\n\nMore.\n"
    made = filled(page, {"one": lambda language: f"new in {language}"}, "zh")
    assert made == "# Mine\n\n<!-- made: one -->\n\nnew in zh\n\n<!-- end of one -->\n\nMore.\n"


def test_each_claim_names_a_test_that_is_there_and_passed() -> None:
    ran = support_parts.recorded()["cpu"]["tests"]
    for claim in support_parts.claims():
        file, _, rest = claim["test"].partition("::")
        name = rest.partition("[")[0]
        assert re.search(rf"(?m)^def {name}\(", (ROOT / file).read_text(encoding="utf-8")), claim
        assert ran.get(claim["test"]) in ("passed", "skipped"), claim


def test_a_claim_holds_only_if_every_case_of_its_test_passed(tmp_path: Path) -> None:
    recorder = SupportRecorder(tmp_path / "found.json")
    recorder.claimed = ["tests/a.py::test_b", "tests/a.py::test_c[x]"]

    def ended(nodeid: str, outcome: str, when: str = "call") -> None:
        report: Any = SimpleNamespace(nodeid=nodeid, outcome=outcome, when=when)
        recorder.pytest_runtest_logreport(report)

    ended("tests/a.py::test_b[1]", "passed")
    ended("tests/a.py::test_b[2]", "failed")
    ended("tests/a.py::test_b[3]", "passed")
    ended("tests/a.py::test_c[x]", "passed", "setup")
    ended("tests/a.py::test_c[x]", "skipped", "setup")
    ended("tests/a.py::test_c[xy]", "failed")
    recorder.pytest_sessionfinish()
    (kept,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert kept["tests"] == {"tests/a.py::test_b": "failed", "tests/a.py::test_c[x]": "skipped"}


@pytest.mark.parametrize("name", ["AGENTS.md", "llms.txt"])
def test_every_file_that_agents_are_sent_to_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert linked
    assert [one for one in linked if not (ROOT / one).exists()] == []
