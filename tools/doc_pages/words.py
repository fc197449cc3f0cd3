"""The Chinese of what the program says in English, one entry a sentence, from `words.zh.yaml`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("words.zh.yaml")
missing: set[str] = set()  # what was asked for in Chinese and has none


@cache
def chinese() -> dict[str, str]:
    """Chinese by English."""
    return {str(english): str(told) for english, told in yaml.safe_load(FILE.read_text(encoding="utf-8")).items()}


# Sentences that begin or are made alike: what stands before, and its Chinese.
BEFORE = {"no effect: ": "不起作用：", "refused: ": "不接受："}
TAKEN = re.compile(r"taken as (`[^`]+`)")


def said(english: str, language: str) -> str:
    """A sentence in a language. One that has no Chinese stays English and is kept in `missing`."""
    if language == "en" or not english:
        return english
    for words, told in BEFORE.items():
        if english.startswith(words):
            return told + said(english.removeprefix(words), language)
    if taken := TAKEN.fullmatch(english):
        return f"当作 {taken[1]}"
    if english not in chinese():
        missing.add(english)
    return chinese().get(english, english)
