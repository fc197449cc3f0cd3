"""The two READMEs say the same: section by section, the same commands, the same keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def headings(text: str) -> list[int]:
    """The levels of the headings, in order."""
    return [len(line) - len(line.lstrip("#")) for line in outside_blocks(text) if line.startswith("#")]


def outside_blocks(text: str) -> list[str]:
    return re.sub(r"(?ms)^```.*?^```$", "", text).splitlines()


def commands(text: str) -> list[str]:
    """The lines of all code blocks without their remarks: after a `#`, or after two blanks in a list of files."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$", text)
    lines = [line for block in blocks for line in block.splitlines()]
    bare = [re.split(r"(?:^|\s+)#|(?<=\S)  ", line)[0] for line in lines]
    return [line for line in bare if line.strip()]


def words_in_code(text: str) -> set[str]:
    """What stands between backquotes outside the blocks, white space aside."""
    return {re.sub(r"\s+", " ", word) for word in re.findall(r"`([^`]+)`", "\n".join(outside_blocks(text)))}


@pytest.mark.parametrize("folder", [ROOT, ROOT / "examples"], ids=["root", "examples"])
def test_the_chinese_readme_is_complete(folder: Path) -> None:
    english, chinese = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert headings(chinese) == headings(english)
    assert words_in_code(chinese) == words_in_code(english)
    assert commands(chinese) == commands(english)
