"""Results of several instruction sets stand beside each other, and the pages are those of the files."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.fresh import Deadline
from benchmarks.quick import BOOK as QUICK
from benchmarks.quick import PARTS
from benchmarks.store import RESULTS, Book, Row

BENCHES = (
    *("train", "generate", "data", "plan", "qlora", "waiting", "quick", "device", "startup", "preferences"),
    *("styles", "attention", "processes", "two_hosts", "kernels"),
)


def about(instructions: str, **more: Any) -> Row:
    return {
        "instructions": instructions,
        "processor": "a processor",
        "threads": 2,
        "dtype": "bfloat16",
        "date": "2026-01-02",
        **more,
    }


def book(folder: Path) -> Book:
    def cells(row: Row) -> list[str]:
        return [row["what"], str(row["rate"])]

    return Book("some", "A title", ("", "rate"), cells, lambda name, part: f"What {name} is.", folder=folder)


def part(rate: int, instructions: str, **more: Any) -> Row:
    return {"machine": about(instructions, **more), "rows": [{"what": "a step", "rate": rate}]}


def test_only_the_same_set_and_part_is_replaced(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.keep({"one": part(1, "AMX"), "two": part(2, "AMX")})
    kept.keep({"one": part(3, "AVX2")})
    written = kept.keep({"one": part(4, "AMX")})
    assert [file.relative_to(tmp_path).as_posix() for file in written] == ["some.md", "some/amx.json"]
    rates = {isa: {name: p["rows"][0]["rate"] for name, p in parts.items()} for isa, parts in kept.sides().items()}
    assert rates == {"AVX2": {"one": 3}, "AMX": {"one": 4, "two": 2}}


def test_the_page_has_a_section_for_each_set_and_says_what_was_measured_on(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.keep({"one": part(1, "AMX"), "two": part(2, "unknown")})
    kept.keep({"one": part(7, "NVIDIA T4", device_gb=15.6, cuda="13.0")})
    page = (tmp_path / "some.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## AMX", "## NVIDIA T4", "## unknown"]
    assert "### one\n\nWhat one is.\nMeasured 2026-01-02 on a processor, 2 threads, bfloat16.\n\n|  | rate |\n" in page
    assert "Measured 2026-01-02 on NVIDIA T4 (16 GB), CUDA 13.0, bfloat16." in page
    assert "|---|---:|\n| a step | 7 |" in page


@pytest.mark.parametrize("bench", BENCHES)
def test_the_pages_in_the_repository_are_those_of_the_files(bench: str) -> None:
    kept: Book = importlib.import_module(f"benchmarks.{bench}").BOOK
    page = RESULTS / f"{bench}.md"
    if not kept.sides():
        assert not page.exists()
        return
    assert page.read_text() == kept.page()
    for instructions, parts in kept.sides().items():
        assert {p["machine"]["instructions"] for p in parts.values()} == {instructions}


def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    over = Deadline(-1)
    found = {name: measured("float32", over) for name, measured in PARTS.items()}
    rows = [row for rows in found.values() for row in rows]
    assert rows
    assert all("left out: the time was over" in row["failed"] for row in rows)
    kept = dataclasses.replace(QUICK, folder=tmp_path)
    kept.keep({name: {"machine": about("AMX"), "rows": rows} for name, rows in found.items()})
    assert json.loads((tmp_path / "quick" / "amx.json").read_text())["instructions"] == "AMX"
    assert (tmp_path / "quick.md").read_text().count("left out: the time was over") == len(rows)
