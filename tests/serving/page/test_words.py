"""Both languages say all that the page says, and nothing that it does not say."""

from __future__ import annotations

import re
import string
from typing import get_args

import pytest

from phinetune.data.check.findings import KINDS
from phinetune.serving.job_table import ENDED, OPEN
from phinetune.serving.page.exports import FAILED, OFFERED, QUEUED, RUNNING, SUCCEEDED
from phinetune.serving.page.forms import Target
from phinetune.serving.page.rendering import OWN
from phinetune.serving.page.views import CHARTS
from phinetune.serving.page.words import NAMES, pick_language, words_of
from phinetune.serving.work import FORMS

FINDINGS = ("finding.", "advice.")  # in other languages than that of data/check/findings.py
PROBLEMS = "problem."  # in other languages than the server's own, by the codes of its errors
# Keys that are put together of a beginning and a value.
TOGETHER = {
    "form.": FORMS,
    "status.": (*OPEN, *ENDED),
    "export.": (QUEUED, RUNNING, SUCCEEDED, FAILED),
    "hand.": get_args(Target),
    "hand.about_": get_args(Target),
    "type.": {kind for kinds in OFFERED.values() for kind in kinds},
    "chart.": CHARTS,
    "compare.": ("left", "right"),
    "nav.": ("data", "train", "compare", "hand-on"),
    "set.": ("n_epochs", "batch_size", "learning_rate_multiplier", "beta", "seed"),
    "about.": ("n_epochs", "batch_size", "learning_rate_multiplier", "beta", "seed"),
    "role.": ("system", "user", "assistant", "tool", "chosen", "rejected"),
    "time.": ("seconds", "minutes", "hours"),
}


def said() -> set[str]:
    """The keys that templates and scripts name."""
    found = {beginning + value for beginning, values in TOGETHER.items() for value in values}
    for place in [*(OWN / "templates").rglob("*.html"), *(OWN / "static").glob("*.js")]:
        text = place.read_text(encoding="utf-8")
        found.update(re.findall(r'\b(?:t|say|t\.has)\("([\w.-]+)"[,)]', text))
        for choice in re.findall(r"\bsay\(([^\n]*\?[^\n]*?)[,)]", text):  # say(a ? "one" : "other")
            found.update(re.findall(r'"([\w.]+\.[\w.]+)"', choice))
        found.update(re.findall(r'\? "([a-z]+\.[a-z_]+)" : "', text))
        found.update(re.findall(r'\? "[a-z]+\.[a-z_]+" : "([a-z]+\.[a-z_]+)"', text))
    return found


@pytest.mark.parametrize("language", NAMES)
def test_a_language_has_the_keys_that_are_used_and_no_others(language: str) -> None:
    table = {key: text for key, text in words_of(language).table.items() if not key.startswith((*FINDINGS, PROBLEMS))}
    assert set(table) == said()
    assert all(text == text.strip() and text for text in table.values())


def test_languages_put_the_same_values_in() -> None:
    def values(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    english, chinese = words_of("en").table, words_of("zh").table
    assert {key: values(text) for key, text in english.items()} == {key: values(chinese[key]) for key in english}
    assert not [key for key, text in english.items() if "\n" in text]


def test_every_finding_has_a_title_and_advice_in_chinese() -> None:
    table = words_of("zh").table
    assert {key for key in table if key.startswith(FINDINGS)} == {start + kind for start in FINDINGS for kind in KINDS}


def test_errors_are_told_in_chinese_above_the_servers_own_sentence() -> None:
    chinese, english = words_of("zh"), words_of("en")
    told = chinese.problem("insufficient_disk", "20 GB are free")
    assert told == f"{chinese.table['problem.insufficient_disk']}\n20 GB are free"
    assert english.problem("insufficient_disk", "20 GB are free") == "20 GB are free"
    assert chinese.problem(None, "What?") == chinese.problem("new", "What?") == "What?"


def test_each_error_in_chinese_is_one_that_the_server_tells() -> None:
    source = "".join(place.read_text(encoding="utf-8") for place in OWN.parent.rglob("*.py"))
    codes = {key.removeprefix(PROBLEMS) for key in words_of("zh").table if key.startswith(PROBLEMS)}
    assert {code for code in codes if f'"{code}"' not in source} == set()
    assert not [key for key in words_of("en").table if key.startswith(PROBLEMS)]


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [
        (None, None, "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "de, en;q=0.5, zh;q=0.7", "zh"),
        (None, "zh;q=0, en;q=0.1", "en"),
        (None, "zh;q=much, ;;,", "en"),
        ("en", "zh", "en"),
        ("zh", None, "zh"),
        ("../../etc", "fr", "en"),
    ],
)
def test_the_language_is_the_chosen_one_or_the_browsers(
    cookie: str | None, accepted: str | None, language: str
) -> None:
    assert pick_language(cookie, accepted) == language


def test_durations_are_in_words() -> None:
    words = words_of("en")
    assert [words.duration(one) for one in (-1, 59.4, 61, 7320)] == ["0 s", "59 s", "1 min 1 s", "2 h 2 min"]
