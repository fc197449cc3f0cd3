"""Reads files that should be UTF-8 text, line by line, and says what is wrong if they are not."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from phinetune.data.read.packed import open_bytes

# Byte order marks. The longer ones come first: UTF-32's begins like UTF-16's.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# For files without a mark: which of the first four bytes are zero, if they encode one or two ASCII letters.
ZERO_BYTES: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}
# How files of other kinds begin, and what to tell the user.
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
    """The file is not text. `line` is the number of the line to show."""

    line = 1


def refuse_other_kinds(path: Path) -> None:
    """Make sure that a file is not of another kind, for example an archive or a web page, judged by its first bytes.

    Raises:
        NotText: it is of another kind.
    """
    with open_bytes(path) as file:
        head = file.read(32)
    kinds = {b"PAR1": ".parquet", b"PK\x03\x04": ".xlsx"}
    for mark, kind in OTHER_KINDS.items():
        if head.startswith(mark) and kinds.get(mark) != path.suffix.lower():
            raise NotText(f"the file is not what its name says; it is {kind}")


def is_utf16_or_utf32(path: Path) -> bool:
    """Whether a file is UTF-16 or UTF-32, judged by its first bytes."""
    return _utf16_or_utf32(path) is not None


def _utf16_or_utf32(path: Path) -> str | None:
    """The name of the file's encoding, if that is UTF-16 or UTF-32; else None."""
    with open_bytes(path) as file:
        head = file.read(4)
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    return marked or ZERO_BYTES.get(tuple(byte == 0 for byte in head))


def lines_of(path: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[tuple[int, bytes | str]]:
    """Numbered lines: as bytes, or as text if the file is UTF-16 or UTF-32.

    A UTF-16 or UTF-32 file is always read whole.

    Args:
        start, stop: the bytes of another file from which and up to which to read. Each begins a line; None is the end.
        first: the number of the line at `start`.
    """
    name = _utf16_or_utf32(path)
    if name:
        with open_bytes(path) as file:
            text = file.read().decode(name, errors="replace").removeprefix("\ufeff")
        yield from enumerate((_DecodedLine(line, name) for line in text.split("\n")), 1)
        return
    with open_bytes(path) as file:
        place = file.seek(start) if start else 0
        for number, line in enumerate(file, first):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            place += len(line)
            if place == stop:
                return


class _DecodedLine(str):
    """A line of a file that is not UTF-8. `name` is the file's encoding."""

    name: str

    def __new__(cls, line: str, name: str) -> _DecodedLine:
        made = super().__new__(cls, line)
        made.name = name
        return made


def decode_line(line: bytes | str) -> tuple[str | None, str | None]:
    """Decode a line.

    Bytes that are not UTF-8 are decoded as Windows-1252, the most likely other encoding.

    Returns:
        the text, or None if the bytes are not Windows-1252 either; and what is wrong with the encoding, or None.
    """
    if isinstance(line, _DecodedLine):
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
    """The number of the first line that is not UTF-8, and what is wrong with it."""
    for number, line in lines_of(path):
        problem = decode_line(line)[1]
        if problem:
            return number, problem
    return 1, "not UTF-8 text; save it as UTF-8"
