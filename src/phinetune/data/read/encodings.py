"""Bytes that should be UTF-8 text: lines of a file, and what is wrong where they are not."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

MARKS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Without a mark: where the zero bytes of two (or one) plain letters stand.
BARE: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}
OTHER_KINDS = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"PK\x03\x04": "a zip archive (or an Office file); unpack or export it",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"(\xb5/\xfd": "a Zstandard archive; unpack it",
    b"%PDF": "a PDF",
    b"SQLite": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<!DOCTYPE": "an HTML page; perhaps a download that went wrong",
    b"<html": "an HTML page; perhaps a download that went wrong",
}


class NotText(Exception):
    """A file that is no UTF-8 text at all; `line` is where to look."""

    line = 1


def refuse_other_kinds(path: Path) -> None:
    """Make sure that a file does not begin like one of another kind: an archive, a web page, …

    Raises:
        NotText: it does.
    """
    with path.open("rb") as file:
        head = file.read(32)
    for mark, kind in OTHER_KINDS.items():
        if head.startswith(mark) and not (mark == b"PAR1" and path.suffix.lower() == ".parquet"):
            raise NotText(f"this is not what its name says but {kind}")


def is_wide(path: Path) -> bool:
    """Whether a file is UTF-16 or UTF-32."""
    return _wide(path) is not None


def _wide(path: Path) -> str | None:
    """UTF-16 or UTF-32, if the file begins that way."""
    with path.open("rb") as file:
        head = file.read(4)
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    return marked or BARE.get(tuple(byte == 0 for byte in head))


def lines_of(path: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[tuple[int, bytes | str]]:
    """Numbered lines: bytes, or text where the whole file is UTF-16 or UTF-32.

    Args:
        start, stop: bytes of a file in UTF-8 between which to read; `first` is the number of the line at `start`.
    """
    name = _wide(path)
    if name:
        text = path.read_bytes().decode(name, errors="replace").removeprefix("\ufeff")
        yield from enumerate((_Wide(line, name) for line in text.split("\n")), 1)
        return
    with path.open("rb") as file:
        place = file.seek(start)
        for number, line in enumerate(file, first):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            place += len(line)
            if place == stop:
                return


class _Wide(str):
    """A line of a file in another encoding, named."""

    name: str

    def __new__(cls, line: str, name: str) -> _Wide:
        made = super().__new__(cls, line)
        made.name = name
        return made


def decode_line(line: bytes | str) -> tuple[str | None, str | None]:
    """The line as text and what is wrong with its encoding; either may be None.

    Bytes that are not UTF-8 are read as Windows-1252, the usual culprit, if that gives text at all.
    """
    if isinstance(line, _Wide):
        return str(line), f"the file is {line.name.upper()[:6]}, not UTF-8; save it as UTF-8"
    if isinstance(line, str):
        return line, None
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte 0x{line[error.start]:02x} at column {error.start + 1}); save it as UTF-8"
    try:
        return line.decode("cp1252"), problem
    except UnicodeDecodeError:
        return None, problem


def bad_place(path: Path) -> tuple[int, str]:
    """(line, problem) of the first bytes in a file that are not UTF-8."""
    for number, line in lines_of(path):
        problem = decode_line(line)[1]
        if problem:
            return number, problem
    return 1, "not UTF-8 text; save it as UTF-8"
