"""The words of the page, in each language: one table a language, with the same keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

COOKIE = "phinetune_language"
NAMES = {"en": "English", "zh": "中文"}  # of the languages, each in itself; the first one stands in for all others
TAGS = {"en": "en", "zh": "zh-Hans"}


@dataclass(frozen=True)
class Words:
    """The words of a language."""

    language: str
    table: Mapping[str, str]

    def __call__(self, key: str, **values: Any) -> str:
        """The words of a key, with values at their places."""
        return self.table[key].format(**values)

    def has(self, key: str) -> bool:
        return key in self.table

    def problem(self, code: str | None, message: str) -> str:
        """What is wrong in this language, if it has words for the code, above the server's own sentence."""
        own = self.table.get(f"problem.{code}")
        return f"{own}\n{message}" if own else message

    @property
    def tag(self) -> str:
        """The language's tag for HTML."""
        return TAGS[self.language]

    def duration(self, seconds: float) -> str:
        """A number of seconds in words, in the two largest units."""
        whole = max(0, round(seconds))
        if whole < 60:
            return self("time.seconds", s=whole)
        if whole < 3600:
            return self("time.minutes", m=whole // 60, s=whole % 60)
        return self("time.hours", h=whole // 3600, m=whole % 3600 // 60)


@cache
def words_of(language: str) -> Words:
    """The words of a language of `NAMES`."""
    text = (files("phinetune.serving.page") / "words" / f"{language}.yaml").read_text(encoding="utf-8")
    return Words(language, yaml.safe_load(text))


def pick_language(cookie: str | None, accepted: str | None) -> str:
    """The language to show.

    Args:
        cookie: what the user chose on the page.
        accepted: the header Accept-Language.
    """
    if cookie in NAMES:
        return cookie
    return next((one for one in _in_order(accepted or "") if one in NAMES), next(iter(NAMES)))


def _in_order(header: str) -> list[str]:
    """The languages of a header, the most wanted first, without their regions."""
    found = []
    for part in header[:500].split(","):
        tag, _, rest = part.strip().partition(";")
        weight = rest.strip().removeprefix("q=")
        try:
            found.append((float(weight or 1), tag.partition("-")[0].lower()))
        except ValueError:
            continue
    return [tag for weight, tag in sorted(found, key=lambda one: -one[0]) if weight > 0]
