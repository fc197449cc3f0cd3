"""Where results stay: one file an instruction set, results/BENCH/SET.json, and one page for people, results/BENCH.md.

A measurement replaces only what was measured on the same instruction set, so the sides stand beside each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.machine import LADDER, slug

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

Row = dict[str, Any]
Part = dict[str, Any]  # {"machine": ..., "rows": [...]}, and what else a benchmark says of a part


@dataclass(frozen=True)
class Book:
    """The results of one benchmark.

    Attributes:
        name: the benchmark's; `python -m benchmarks.NAME` measures it.
        title: the page's heading.
        headings: of the tables' columns; the first and the last that are `words` are set to the left.
        cells: a row as text, in the order of `headings`.
        meaning: a sentence or two on a part, for the page.
        words: headings of columns that hold words.
        folder: where the results lie.
    """

    name: str
    title: str
    headings: Sequence[str]
    cells: Callable[[Row], list[str]]
    meaning: Callable[[str, Part], str]
    words: Sequence[str] = ("", "besides")
    folder: Path = field(default=RESULTS)

    def keep(self, parts: Mapping[str, Part]) -> list[Path]:
        """Write parts, each to the file of its machine's instruction set, and the page anew. Other parts stay.

        Returns:
            the files written.
        """
        written = []
        for instructions in dict.fromkeys(part["machine"]["instructions"] for part in parts.values()):
            file = self.folder / self.name / f"{slug(instructions)}.json"
            new = {name: part for name, part in parts.items() if part["machine"]["instructions"] == instructions}
            both = {"instructions": instructions, "parts": {**self._read(file).get("parts", {}), **new}}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(both, indent=1) + "\n")
            written.append(file)
        page = self.folder / f"{self.name}.md"
        page.write_text(self.page())
        return [page, *written]

    def sides(self) -> dict[str, dict[str, Part]]:
        """All parts by instruction set, from the weakest to the strongest, then devices."""
        read = [self._read(file) for file in sorted((self.folder / self.name).glob("*.json"))]
        order = {name: place for place, name in enumerate(LADDER)}
        read.sort(key=lambda side: order.get(side["instructions"], len(order)))
        return {side["instructions"]: side["parts"] for side in read}

    def page(self) -> str:
        """The page as Markdown: a section an instruction set, a table a part."""
        lines = [f"# {self.title}", "", f"Written by `python -m benchmarks.{self.name}`, which says how."]
        for instructions, parts in self.sides().items():
            lines += ["", f"## {instructions}"]
            for name, part in parts.items():
                lines += ["", f"### {name}", "", self.meaning(name, part).strip(), measured(part["machine"]), ""]
                lines += ["| " + " | ".join(self.headings) + " |"]
                lines += ["|" + "|".join("---" if h in self.words else "---:" for h in self.headings) + "|"]
                lines += ["| " + " | ".join(self.cells(row)) + " |" for row in part["rows"]]
        return "\n".join(lines) + "\n"

    def table(self, title: str, rows: Sequence[Row]) -> Table:
        """The rows of a part for the terminal."""
        table = Table(title=title)
        for heading in self.headings:
            table.add_column(heading, justify="left" if heading in self.words else "right")
        for row in rows:
            table.add_row(*self.cells(row))
        return table

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found


def measured(machine: Row) -> str:
    """When and on what a part was measured, in a sentence."""
    where = f"{machine['processor']}, {machine['threads']} threads"
    if "cuda" in machine:
        where = f"{machine['instructions']} ({machine['device_gb']:.0f} GB), CUDA {machine['cuda']}"
    about = "" if machine["dtype"] in ("none", "auto") else f", {machine['dtype']}"
    beside = f" Beside it ran {machine['beside']}." if "beside" in machine else ""
    return f"Measured {machine['date']} on {where}{about}.{beside}"
