"""Finds rows that are alike: equal apart from white space and case, or nearly equal.

Nearly equal rows are found by MinHash with locality-sensitive hashing (Broder 1997).
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

Hashes = np.ndarray[tuple[int], np.dtype[np.uint32]]  # of a row's shingles, each once

ALIKE = 0.8  # least Jaccard similarity of nearly equal rows: the share of their shingles that both have
MAX_ROWS = 50_000  # rows kept for comparison; further rows are compared only with these
MAX_SHINGLES = 50_000_000  # shingles kept for comparison, 4 bytes each
MAX_CHARACTERS = 20_000  # of a row; the rest is not compared
_MIN_SHINGLES = 8  # rows with fewer shingles can be alike by chance
_PERMUTATIONS = 128
# What a false positive and a false negative of the index cost. Misses cost more: each candidate is checked exactly.
_WEIGHTS = (0.2, 0.8)


def exact_key(text: str) -> bytes:
    """A key of 16 bytes. Texts that differ only in white space and case have the same key."""
    return hashlib.blake2b(" ".join(text.split()).casefold().encode("utf-8", "replace"), digest_size=16).digest()


def shingles(text: str) -> set[bytes]:
    """The overlapping pieces of a text: three words each, or five letters if words are not separated, as in Chinese."""
    words = re.findall(r"\w+", text[:MAX_CHARACTERS].casefold())
    letters = sum(map(len, words))
    if words and letters / len(words) > 15:
        joined = "".join(words)
        return {joined[i : i + 5].encode("utf-8", "replace") for i in range(max(1, len(joined) - 4))}
    return {" ".join(words[i : i + 3]).encode("utf-8", "replace") for i in range(max(1, len(words) - 2))}


def hashes_of(text: str) -> Hashes:
    """A text's shingles as numbers, shape (shingles). Two shingles of a row hardly ever get the same number."""
    return np.unique(np.fromiter(map(zlib.crc32, shingles(text)), np.uint32))


class NearDuplicates:
    """Finds for a row an earlier row that is nearly equal. Keeps 4 bytes for each shingle, but no texts.

    Attributes:
        lacks_rows: whether rows were not added, because there is no more room.
    """

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._index: Any = MinHashLSH(threshold=ALIKE, num_perm=_PERMUTATIONS, weights=_WEIGHTS)
        self._empty: Any = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        self._shingles: dict[int, Hashes] = {}
        self._held = 0
        self.lacks_rows = False

    def find(self, mine: Hashes) -> int | None:
        """The number of the first added row that is nearly equal to one with these shingles; None if there is none."""
        return None if len(mine) < _MIN_SHINGLES else next(self._matches(mine, self._sketch(mine)), None)

    def find_all(self, mine: Hashes, known: Container[int]) -> list[int]:
        """The numbers of added rows that are nearly equal to one with these shingles: the first, and all others but
        those that are known.
        """
        return [] if len(mine) < _MIN_SHINGLES else [*self._matches(mine, self._sketch(mine), known)]

    def add(self, number: int, mine: Hashes) -> int | None:
        """As `find`. If it finds no row, this one is added under `number`: of rows that are alike the first stands for
        the others.
        """
        if len(mine) < _MIN_SHINGLES:
            return None
        sketch = self._sketch(mine)
        match = next(self._matches(mine, sketch), None)
        if match is None:
            self._keep(number, mine, sketch)
        return match

    def keep(self, number: int, mine: Hashes) -> None:
        """Add a row under `number`, whatever rows are like it."""
        if len(mine) >= _MIN_SHINGLES:
            self._keep(number, mine, self._sketch(mine))

    def _keep(self, number: int, mine: Hashes, sketch: Any) -> None:
        if len(self._shingles) >= MAX_ROWS or self._held >= MAX_SHINGLES:
            self.lacks_rows = True
            return
        self._index.insert(number, sketch)
        self._shingles[number] = mine
        self._held += len(mine)

    def _sketch(self, mine: Hashes) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch(mine)
        return sketch

    def _matches(self, mine: Hashes, sketch: Any, known: Container[int] = ()) -> Iterator[int]:
        found = False
        for number in sorted(self._index.query(sketch)):
            if (found and number in known) or not self._are_alike(mine, self._shingles[number]):
                continue
            found = True
            yield int(number)

    def _are_alike(self, mine: Hashes, other: Hashes) -> bool:
        both = len(np.intersect1d(mine, other, assume_unique=True))
        return both / (len(mine) + len(other) - both) >= ALIKE
