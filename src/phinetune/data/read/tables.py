"""Rows of tables: CSV, TSV, and sheets of Excel's .xlsx."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phinetune.data.read.packed import open_bytes
from phinetune.data.read.plain_values import plain
from phinetune.data.read.row import Broken, Row

logger = logging.getLogger(__name__)

SIGNS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
SEP = re.compile(r"sep=(.)\r?\n?")  # Excel's own first line, which says what sets columns apart
SENTENCE = re.compile(r"(\s.*[.?!]|[。？！])\s*$")  # an end of one, after more than a word
LONGEST_NAME = 60
QUOTED = re.compile('"[^"]*"')
MISSING: Any = object()  # stands where a row of a CSV file has no cell


def read_csv(path: Path) -> Iterator[Row | Broken]:
    return _separated(path, ",")


def read_tsv(path: Path) -> Iterator[Row | Broken]:
    return _separated(path, "\t")


def _separated(path: Path, own: str) -> Iterator[Row | Broken]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        told = SEP.fullmatch(first)
        sign, above = (told[1], 1) if told else (_sign(first, own), 0)
        if sign != own:
            logger.warning("%s: its columns are set apart by %s", path, SIGNS.get(sign, f"`{sign}`"))
        lines = file if told else itertools.chain([first], file)
        reader = csv.DictReader(lines, strict=True, restval=MISSING, delimiter=sign)
        yield from _below_names(path, reader, above, "TSV" if own == "\t" else "CSV")


def _below_names(path: Path, reader: csv.DictReader[str], above: int, kind: str) -> Iterator[Row | Broken]:
    """The rows of a table.

    Args:
        above: lines of the file before the reader's first one.
        kind: what an error calls the file.
    """
    line = above + 1
    try:
        problem = _named_twice(reader.fieldnames or [])
        if problem:
            yield Broken(f"{path}:{line}", problem)
            return
        _warn_of_a_row(path, reader.fieldnames or [])
        line = above + reader.line_num + 1
        for fields in reader:
            if fields.pop(None, None) is not None:
                yield Broken(f"{path}:{line}", "more cells than the header has columns")
            elif MISSING in fields.values():
                yield Broken(f"{path}:{line}", "fewer cells than the header has columns")
            else:
                yield Row(f"{path}:{line}", {k: v or None for k, v in fields.items()})
            line = above + reader.line_num + 1
    except csv.Error as error:
        yield Broken(f"{path}:{line}", f"broken {kind}: {error}")


def _sign(first: str, own: str) -> str:
    """What stands between the columns' names: the sign of the file's kind, or another where that is not there.

    Excel writes semicolons in a .csv where numbers have a comma.
    """
    names = QUOTED.sub("", first)
    return own if own in names else next((sign for sign in SIGNS if sign in names), own)


def _named_twice(header: Sequence[str]) -> str | None:
    twice = [name for name, count in Counter(header).items() if count > 1]
    return f"two columns are named `{twice[0]}`, and only one could be read; rename one" if twice else None


def _warn_of_a_row(path: Path, header: Sequence[str]) -> None:
    """Tell of a first line that is read as names of columns and looks like a row: it has a sentence."""
    sentence = next((name for name in header if len(name) > LONGEST_NAME or SENTENCE.search(name)), None)
    if sentence:
        logger.warning(
            "%s: the first line is read as the names of the columns; `%s` looks like a row's words. If it is one, put "
            "a line of names above it, for example `prompt` and `completion`",
            path,
            sentence if len(sentence) <= LONGEST_NAME else f"{sentence[:LONGEST_NAME]}…",
        )


def can_read_sheets() -> bool:
    """Whether the library that reads .xlsx is installed."""
    return find_spec("openpyxl") is not None


def read_sheet(path: Path, name: str | None = None) -> Iterator[Row | Broken]:
    """The rows below the header of a sheet, as Excel numbers them. Empty rows are passed over.

    Args:
        name: the sheet; None is the first one, and a warning names the others.
    """
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zipfile's, openpyxl's and the parser's own errors, of many classes
        yield Broken(str(path), f"not a readable .xlsx file: {error}")
        return
    try:
        if name and name not in book.sheetnames:
            sheets = ", ".join(book.sheetnames)
            yield Broken(str(path), f"there is no sheet `{name}`; there are {sheets} (data.name)")
            return
        if not name and len(book.sheetnames) > 1:
            others = ", ".join(book.sheetnames[1:])
            logger.warning(
                "%s: the sheet `%s` is read; not read: %s (data.name chooses)", path, book.sheetnames[0], others
            )
        yield from _below_header(path, book[name or book.sheetnames[0]].iter_rows(values_only=True))
    finally:
        book.close()


def _below_header(path: Path, lines: Iterator[Sequence[Any]]) -> Iterator[Row | Broken]:
    header: list[str] | None = None
    for number, cells in enumerate(lines, 1):
        if all(cell is None for cell in cells):
            continue
        where = f"{path}: row {number}"
        if header is None:
            header = ["" if cell is None else str(cell).strip() for cell in cells]
            problem = _named_twice([name for name in header if name])
            if problem:
                yield Broken(where, problem)
                return
            _warn_of_a_row(path, header)
            continue
        unnamed = [place for place, cell in enumerate(cells) if cell is not None and not (header + [""] * place)[place]]
        if unnamed:
            yield Broken(where, f"cell {unnamed[0] + 1} stands in a column without a heading")
            continue
        yield Row(where, {name: plain(cell) for name, cell in zip(header, cells, strict=False) if name})
