"""Work a part at a time, so that what lies between its steps stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from phinetune.engine.kernels.matmul import cut

PART = 1 << 19  # elements: 2 MB in float32


def parts(x: Tensor) -> Iterator[slice]:
    """Runs of rows with at most `PART` elements, one row at least; a GPU takes all at once."""
    width = max(1, x.numel() // max(1, len(x)))
    return cut(len(x), width, PART if x.device.type == "cpu" else None)
