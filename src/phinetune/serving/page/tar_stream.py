"""A folder as a tar archive, written while it is sent: nothing of it is kept in memory or on the disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

PIECE = 1 << 20
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


def tar_stream(folder: Path) -> tuple[int, Iterator[bytes]]:
    """The archive's size in bytes, and its pieces. Links and what is no plain file are left out."""
    heads = [(place, _head(place, folder)) for place in sorted(folder.rglob("*")) if _is_plain(place)]
    size = sum(len(head) + _padded(place.stat().st_size) for place, head in heads) + len(END)
    return size, _pieces(heads)


def _pieces(heads: list[tuple[Path, bytes]]) -> Iterator[bytes]:
    for place, head in heads:
        yield head
        size = 0
        with place.open("rb") as file:
            while piece := file.read(PIECE):
                size += len(piece)
                yield piece
        yield bytes(_padded(size) - size)
    yield END


def _head(place: Path, folder: Path) -> bytes:
    info = tarfile.TarInfo(f"{folder.name}/{place.relative_to(folder).as_posix()}")
    info.size, info.mtime, info.mode = place.stat().st_size, int(place.stat().st_mtime), 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _is_plain(place: Path) -> bool:
    return place.is_file() and not place.is_symlink()


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
