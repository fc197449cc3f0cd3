"""Rows that are alike: exactly (but for white space and case), or nearly, by MinHash."""

from __future__ import annotations

import hashlib
import re
import zlib
from typing import Any

import numpy as np

ALIKE = 0.8  # of the shingles of both rows together
LOOKED_AT = 50_000  # rows that are compared with each other; more are compared with these only
HELD = 50_000_000  # shingles held of them, 4 bytes each
LONGEST = 20_000  # characters of a row that are compared
_FEWEST = 8  # shingles: shorter rows are alike by chance
_PERMUTATIONS = 128
_WEIGHTS = (0.2, 0.8)  # of candidates too many against candidates missed: each is looked at again


def exact_key(text: str) -> bytes:
    """The same for texts that differ in white space and case only."""
    return hashlib.blake2b(" ".join(text.split()).casefold().encode("utf-8", "replace"), digest_size=16).digest()


def shingles(text: str) -> set[bytes]:
    """Word triples; runs of five letters where words are not set apart, as in Chinese."""
    words = re.findall(r"\w+", text[:LONGEST].casefold())
    letters = sum(map(len, words))
    if words and letters / len(words) > 15:
        joined = "".join(words)
        return {joined[i : i + 5].encode("utf-8", "replace") for i in range(max(1, len(joined) - 4))}
    return {" ".join(words[i : i + 3]).encode("utf-8", "replace") for i in range(max(1, len(words) - 2))}


class NearDuplicates:
    """Finds, for a row, one that came before and is nearly like it. Holds 4 bytes a shingle, not the texts."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._index: Any = MinHashLSH(threshold=ALIKE, num_perm=_PERMUTATIONS, weights=_WEIGHTS)
        self._empty: Any = MinHash(num_perm=_PERMUTATIONS)
        self._shingles: dict[int, np.ndarray[Any, Any]] = {}
        self._held = 0

    def find(self, text: str) -> int | None:
        """The number of the first row taken in that is nearly like `text`."""
        mine = shingles(text)
        return None if len(mine) < _FEWEST else self._match(mine, self._sketch(mine))

    def add(self, number: int, text: str) -> int | None:
        """`find`; a row like none before is taken in under its number."""
        mine = shingles(text)
        if len(mine) < _FEWEST:
            return None
        sketch = self._sketch(mine)
        match = self._match(mine, sketch)
        if match is None and len(self._shingles) < LOOKED_AT and self._held < HELD:  # one of each cluster stands for it
            self._index.insert(number, sketch)
            self._shingles[number] = _hashes(mine)
            self._held += len(mine)
        return match

    def _sketch(self, mine: set[bytes]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch(mine)
        return sketch

    def _match(self, mine: set[bytes], sketch: Any) -> int | None:
        for number in sorted(self._index.query(sketch)):
            other = self._shingles[number]
            both = len(np.intersect1d(_hashes(mine), other, assume_unique=True))
            if both / (len(mine) + len(other) - both) >= ALIKE:
                return int(number)
        return None


def _hashes(mine: set[bytes]) -> np.ndarray[Any, Any]:
    """The shingles as numbers, shape (shingles); two of a row are hardly ever one number."""
    return np.fromiter(map(zlib.crc32, mine), np.uint32, len(mine))
