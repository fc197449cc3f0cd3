"""The sum of a weight and its update, and whether it still is the sum of what it was made of."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class MergedWeight:
    """A merged weight, and the tensors that it was made of, the weight first.

    torch counts how often a tensor was written to. `versions` holds that number for the sum and each part. A write
    through `.data` is not counted. A copy of a tensor counts anew, so a copy of this has no versions.
    """

    weight: nn.Parameter
    parts: tuple[Tensor | None, ...]
    versions: tuple[int, ...] | None = None

    @classmethod
    def of(cls, total: Tensor, parts: tuple[Tensor | None, ...]) -> MergedWeight:
        """`total` as the sum of `parts`."""
        weight = nn.Parameter(total, requires_grad=False)
        return cls(weight, parts, tuple(map(_version, (weight, *parts))))

    def is_of(self, parts: tuple[Tensor | None, ...]) -> bool:
        """Whether this is known to be the sum of `parts` as they are now."""
        same = all(map(operator.is_, self.parts, parts))
        return same and self.versions == tuple(map(_version, (self.weight, *parts)))

    def is_written(self) -> bool:
        """Whether the sum itself was written to."""
        return self.versions is not None and self.versions[0] != _version(self.weight)

    def __reduce__(self) -> Any:
        return MergedWeight, (self.weight, self.parts)


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written to. torch does not count it for a tensor made in inference mode."""
    try:
        return 0 if tensor is None else tensor._version
    except RuntimeError:
        return 0
