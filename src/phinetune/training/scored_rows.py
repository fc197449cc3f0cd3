"""Which held-out rows are scored, where all of them would take too long."""

from __future__ import annotations

import math


def spread(of: int, wanted: int, block: int) -> list[int] | None:
    """The places of about so many rows, in whole blocks that lie evenly over all of them; None is all.

    Args:
        of: how many rows there are.
        wanted: how many are scored at least, if there are so many.
        block: rows that belong together.
    """
    if wanted >= of:
        return None
    blocks = math.ceil(of / block)
    number = min(blocks, math.ceil(wanted / block))
    starts = [block * (place * blocks // number) for place in range(number)]
    return [one for start in starts for one in range(start, min(of, start + block))]
