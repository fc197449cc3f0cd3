"""The READMEs of the examples say the same in both languages; tests/test_docs_pages.py compares the other pages."""

from __future__ import annotations

from pathlib import Path

from docs_pages import commands, headings, words_in_code

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_chinese_readme_is_complete() -> None:
    english, chinese = ((EXAMPLES / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert headings(chinese) == headings(english)
    assert words_in_code(chinese) == words_in_code(english)
    assert commands(chinese) == commands(english)
