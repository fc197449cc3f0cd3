"""Rows of tables: CSV, TSV, and sheets of Excel's .xlsx."""

from __future__ import annotations

import csv
import io
import logging
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

MISSING: Any = object()  # stands where a row of a CSV file has no cell


def read_csv(path: Path) -> Iterator[Row | Broken]:
    return _separated(path, ",")


def read_tsv(path: Path) -> Iterator[Row | Broken]:
    return _separated(path, "\t")


def _separated(path: Path, sign: str) -> Iterator[Row | Broken]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, restval=MISSING, delimiter=sign)
        line = 1
        try:
            problem = _other_separator(reader.fieldnames or [], sign) or _named_twice(reader.fieldnames or [])
            if problem:
                yield Broken(f"{path}:1", problem)
                return
            line = reader.line_num + 1
            for fields in reader:
                if fields.pop(None, None) is not None:
                    yield Broken(f"{path}:{line}", "more cells than the header has columns")
                elif MISSING in fields.values():
                    yield Broken(f"{path}:{line}", "fewer cells than the header has columns")
                else:
                    yield Row(f"{path}:{line}", {k: v or None for k, v in fields.items()})
                line = reader.line_num + 1
        except csv.Error as error:
            yield Broken(f"{path}:{line}", f"broken {'CSV' if sign == ',' else 'TSV'}: {error}")


def _other_separator(header: Sequence[str], own: str) -> str | None:
    signs = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
    if len(header) != 1 or (found := next((sign for sign in signs if sign in header[0] and sign != own), None)) is None:
        return None
    if own == "\t":
        return f"the columns are set apart by {signs[found]}, not by tabs; name the file .csv" if found == "," else None
    name = "save the file with commas" + (", or name it .tsv" if found == "\t" else "")
    return f"the columns are set apart by {signs[found]}; {name}"


def _named_twice(header: Sequence[str]) -> str | None:
    twice = [name for name, count in Counter(header).items() if count > 1]
    return f"two columns are named `{twice[0]}`, and only one could be read; rename one" if twice else None


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
            continue
        unnamed = [place for place, cell in enumerate(cells) if cell is not None and not (header + [""] * place)[place]]
        if unnamed:
            yield Broken(where, f"cell {unnamed[0] + 1} stands in a column without a heading")
            continue
        yield Row(where, {name: plain(cell) for name, cell in zip(header, cells, strict=False) if name})
