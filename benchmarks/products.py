"""The rate of matrix products on this processor, as it is at a moment: other machines on the same host change it."""

from __future__ import annotations

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


class Beside:
    """Rates of products right before and after what is measured, in its dtype and in float32."""

    TIMES = 3

    def __init__(self, dtype: str) -> None:
        self._operands = {name: operands(getattr(torch, name)) for name in dict.fromkeys((dtype, "float32"))}
        best = {name: best_rate(pairs, 2 * self.TIMES) for name, pairs in self._operands.items()}
        self._faster = max(best, key=best.__getitem__)
        self._before = 0.0
        self.rates: list[float] = []

    def begin(self) -> None:
        """Something is to be measured now."""
        self._before = best_rate(self._operands[self._faster], self.TIMES)

    def end(self) -> None:
        """It has been measured: keep the better of the rates before and after it."""
        self.rates.append(max(self._before, best_rate(self._operands[self._faster], self.TIMES)))
