"""Several linear layers over the same rows, whose outputs lie side by side: q, k and v, or gate and up.

In Phi-3 they are one fused layer. In Llama's form each has a weight and an adapter of its own. They are computed one
after the other, each by its own functions, so the numbers are those of the separate layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from phinetune.engine.kernels.unrecorded import Kept
from phinetune.lora.functional import Projection


@dataclass(frozen=True)
class KeptParts:
    """What several projections keep for their backward; stands for the `Kept` of one."""

    parts: tuple[Kept, ...]

    def drop(self, tensor: Tensor) -> None:
        """See `Kept.drop`."""
        for part in self.parts:
            part.drop(tensor)

    def restore(self, tensor: Tensor) -> None:
        """See `Kept.restore`."""
        for part in self.parts:
            part.restore(tensor)


@dataclass(frozen=True)
class SideBySide:
    """Projections of the same rows, to be called as one `Projection` is."""

    parts: tuple[Projection, ...]

    @property
    def trains(self) -> bool:
        """Whether an adapter of one of them does."""
        return any(part.trains for part in self.parts)

    @property
    def keeps_input(self) -> bool:
        """Whether a backward needs the input."""
        return any(part.keeps_input for part in self.parts)

    @property
    def matrices(self) -> tuple[Tensor | None, ...]:
        """A and B of each part."""
        return tuple(matrix for part in self.parts for matrix in part.matrices)

    room = 0  # its parts' weights have none: each would write its own h behind the rows of the same x

    def __call__(self, x: Tensor, needs_x: bool, has_room: bool = False) -> tuple[Tensor, KeptParts]:
        """The output for x of shape (rows, in), and what the backward needs.

        The parts are written into one tensor, so that at most one of them is held twice.
        """
        out = x.new_empty(len(x), sum(part.out for part in self.parts))
        kept, first = [], 0
        for part in self.parts:
            made, keeps = part(x, needs_x)
            out[:, first : first + part.out] = made
            kept.append(keeps)
            first += part.out
        return out, KeptParts(tuple(kept))

    def kept(self, x: Tensor, needs_x: bool) -> KeptParts:
        """What the backward needs, without the output."""
        return KeptParts(tuple(part.kept(x, needs_x) for part in self.parts))

    def backward(
        self, kept: KeptParts, grad: Tensor, has_room: bool = False
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, and those of `matrices`."""
        dx: Tensor | None = None
        grads: list[Tensor | None] = []
        pieces = grad.split([part.out for part in self.parts], dim=1)
        for part, keeps, piece in zip(self.parts, kept.parts, pieces, strict=True):
            more, found = part.backward(keeps, piece)
            dx = more if dx is None or more is None else dx.add_(more)
            grads += found
        return dx, grads
