"""The rate of matrix products on this processor, as it is at a moment: other machines on the same host change it."""

from __future__ import annotations

import statistics
import time

import torch

SIZES = ((2048, 3072, 9216), (2048, 2048, 2048), (1024, 8192, 3072))
Operands = list[tuple[torch.Tensor, torch.Tensor]]


def operands(dtype: torch.dtype) -> Operands:
    """What is multiplied: rows by the transposed matrix of a layer."""
    return [
        (torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype))
        for rows, inner, columns in SIZES
    ]


def best_rate(pairs: Operands, times: int) -> float:
    """The best rate of a product, each done so many times, in operations a second."""
    best = 0.0
    for a, b in pairs:
        for _ in range(times):
            start = time.perf_counter()
            torch.mm(a, b.t())
            best = max(best, 2.0 * a.numel() * len(b) / (time.perf_counter() - start))
    return best


class Products:
    """The rate of the best product in these seconds, in a dtype or in float32, whichever is faster here.

    A shape's rate is its median, not its best: within a second a processor that others share may be twice as fast for
    the time of one product.
    """

    TIMES = 5

    def __init__(self, dtype: str) -> None:
        made = [operands(getattr(torch, name)) for name in dict.fromkeys((dtype, "float32"))]
        self._operands = max(made, key=lambda pairs: best_rate(pairs, self.TIMES))

    def rate(self) -> float:
        """It, in operations a second."""
        return max(self._median(a, b) for a, b in self._operands)

    def _median(self, a: torch.Tensor, b: torch.Tensor) -> float:
        return statistics.median(best_rate([(a, b)], 1) for _ in range(self.TIMES))
