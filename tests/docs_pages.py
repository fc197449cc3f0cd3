"""The pages that people read: READMEs and docs/, their links, headings and code blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOR_PROGRAMS = {DOCS / "agents.md"}  # read by coding agents: English alone
JOINTS = {"|", "||", "&&", ";", "&"}
SHELL = {"until", "while", "do", "done", "if", "then", "fi", "!"}
CHINESE = {"README.md": "README.zh-CN.md"}  # of others: page.md, page.zh.md


class Block(NamedTuple):
    """A code block. `line` is that of its fence, counted from 1."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page of docs/, and both READMEs."""
    return [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(DOCS.rglob("*.md"))]


def is_chinese(page: Path) -> bool:
    return page.name.endswith((".zh.md", ".zh-CN.md"))


def chinese_of(page: Path) -> Path:
    return page.with_name(CHINESE.get(page.name, f"{page.stem}.zh.md"))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The code blocks of a page, of some languages or of all."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], fence[2])
        for fence in re.finditer(r"(?ms)^```([\w-]*)[^\n]*\n(.*?)^```$", text)
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def headings(text: str) -> list[int]:
    """The levels of the headings, in order."""
    return [len(line) - len(line.lstrip("#")) for line in prose(text).splitlines() if re.match(r"#+ ", line)]


def commands(text: str) -> list[str]:
    """The lines of all code blocks without their remarks: after a `#`, or after two blanks in a list of files."""
    found = re.findall(r"(?ms)^```\w*\n(.*?)^```$", text)
    lines = [line for block in found for line in block.splitlines()]
    bare = [re.split(r"(?:^|\s+)#|(?<=\S)  ", line)[0] for line in lines]
    return [line for line in bare if line.strip()]


def words_in_code(text: str) -> set[str]:
    """What stands between backquotes outside the blocks, white space aside."""
    return {re.sub(r"\s+", " ", word) for word in re.findall(r"`([^`]+)`", prose(text))}


def links(text: str) -> Iterator[str]:
    """The targets of a page's links and pictures that lead to files of this repository."""
    bare = re.sub(r"`[^`]*`", "", prose(text))
    for target in re.findall(r"\]\(([^)\s]+)\)", bare):
        if not re.match(r"https?:|mailto:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors of a page: those of its headings, as GitHub and the site make them, and the ids that it gives."""
    text = prose(page.read_text(encoding="utf-8"))
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    made = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return made | set(re.findall(r'<span id="([\w-]+)">', text))


def programs(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of shell lines, without redirections and the shell's own words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in JOINTS:
                command = plain(words)
                if command:
                    yield command
                words = []
            else:
                words.append(word)


def plain(words: list[str]) -> list[str]:
    """A command without what the shell takes from it."""
    while words and words[0] in SHELL:
        words = words[1:]
    ends = [place for place, word in enumerate(words) if word[0] in "<>"]
    return words[: ends[0]] if ends else words
