"""How much of what rows teach stands in one of them only, and can so be learnt by heart and in no other way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phinetune.engine.examples import IGNORED, Encoded


def share_in_one_row(rows: Sequence[Encoded]) -> float:
    """The share of the pairs of neighbouring trained tokens that no other row has.

    Rows that are made alike (one form of answer, few words) share nearly all their pairs, texts of many tasks few of
    them. Measured with the starter's tokenizer on 50 to 400 rows: 0 to 0.09 for five sets of the first kind, 0.29 to
    0.80 for five of the second (Alpaca's short and long rows, its Chinese ones, code, sums in words).

    A row that stands there several times, as a source with a weight above 1 has it, counts once.

    Returns:
        0 where there is no pair.
    """
    pairs = [_pairs(row) for row in {(*row.input_ids, None, *row.labels): row for row in rows}.values()]
    every = np.concatenate(pairs) if pairs else np.empty(0, np.int64)
    if not len(every):
        return 0.0
    values, which = np.unique(every, return_inverse=True)
    owner = np.repeat(np.arange(len(pairs)), [len(one) for one in pairs])
    holders = np.bincount(np.unique(which * len(pairs) + owner) // len(pairs), minlength=len(values))
    return float((holders[which] == 1).mean())


def _pairs(row: Encoded) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The pairs of a row, each as one number."""
    ids, trained = np.asarray(row.input_ids, np.int64), np.asarray(row.labels) != IGNORED
    both = trained[:-1] & trained[1:]
    return np.asarray((ids[:-1][both] << 32) | ids[1:][both], np.int64)
