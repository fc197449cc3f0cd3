"""Element-wise work on a CPU, a chunk of rows at a time, so that the steps' results stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from phinetune.engine.kernels.matmul import row_slices

MAX_ELEMENTS = 1 << 19  # of a chunk: 2 MB in float32


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of `x` in order, with at most `MAX_ELEMENTS` elements each but at least one row.

    On a GPU one slice covers all rows.
    """
    width = max(1, x.numel() // max(1, len(x)))
    return row_slices(len(x), width, MAX_ELEMENTS if x.device.type == "cpu" else None)
