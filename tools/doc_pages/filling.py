"""Pages of docs/ hold text that people write, and parts between two comments that are made: this fills the parts in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
LANGUAGES = ("en", "zh")
PART = re.compile(r"(?ms)^<!-- made: ([\w -]+) -->$.*?^<!-- end of \1 -->$")
Part = Callable[[str], str]  # from a language to Markdown


def filled(text: str, parts: Mapping[str, Part], language: str) -> str:
    """A page with each of its made parts as the program is now. A name that no part has is a KeyError."""

    def made(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- made: {name} -->\n\n{parts[name](language).strip()}\n\n<!-- end of {name} -->"

    return PART.sub(made, text)


def language_of(page: Path) -> str:
    """The language of a page, by its name: `page.zh.md` is Chinese."""
    return "zh" if page.name.endswith(".zh.md") else "en"


def pages(folder: Path = DOCS) -> list[Path]:
    """The pages that have made parts."""
    return [page for page in sorted(folder.rglob("*.md")) if PART.search(page.read_text(encoding="utf-8"))]


def parts_of(page: Path) -> list[str]:
    """The names of a page's made parts, in order."""
    return [found[1] for found in PART.finditer(page.read_text(encoding="utf-8"))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table.

    Args:
        numbers: places of columns that are aligned to the right.
    """
    line = ["---:" if i in numbers else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(one) + " |" for one in (head, line, *rows))


def cell(text: str) -> str:
    """A text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
