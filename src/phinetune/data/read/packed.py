"""Opens files of text that may be packed: `chats.jsonl.gz`, `chats.csv.zst`. They are read as they are unpacked."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import BinaryIO, cast

UNPACKED = (".gz", ".zst")  # read here
PACKED = (*UNPACKED, ".zip", ".bz2", ".xz", ".7z", ".tar", ".tgz")
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")


def kind_of(path: Path) -> str:
    """The kind of a file, by its name: `.csv` for `a.csv` and for `a.csv.gz`."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in UNPACKED and inner in TEXT_KINDS else suffix


def open_bytes(path: Path) -> BinaryIO:
    """A file's content, unpacked.

    Raises:
        OSError: it can't be read, or it is not packed as its name says.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream))
    return path.open("rb")
