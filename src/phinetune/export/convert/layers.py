"""What a conversion works on: one layer's adapter, a fused layer's splits, and layers called by their names' ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Splits:
    """A fused layer's splits: the rows of each, and which of them have an adapter."""

    rows: tuple[int, ...]
    on: tuple[bool, ...]

    @property
    def out(self) -> int:
        """Rows of the whole layer."""
        return sum(self.rows)

    @property
    def adapted_rows(self) -> int:
        """Rows of loralib's lora_B."""
        return sum(rows for rows, on in zip(self.rows, self.on, strict=True) if on)

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Of each adapted split: its rows in the layer, and its rows in loralib's lora_B."""
        row = held = 0
        for rows, on in zip(self.rows, self.on, strict=True):
            if on:
                yield slice(row, row + rows), slice(held, held + rows)
                held += rows
            row += rows


@dataclass(frozen=True)
class Adapter:
    """The adapter of one layer as a file holds it.

    Attributes:
        a, b: (r, in) and (out, r); with `splits` (g·r, in) and (rows of the g adapted splits, r).
        scale: s in s · B A.
        embedding: whether the layer is an embedding: (r, num_embeddings) and (embedding_dim, r).
        splits: a `MergedLinear`'s.
    """

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False
    splits: Splits | None = None

    @property
    def rank(self) -> int:
        """r as the layer's constructor takes it."""
        return self.b.shape[1]

    @property
    def out(self) -> int:
        """Rows of the update."""
        return self.splits.out if self.splits else self.b.shape[0]

    def with_scale(self, scale: float) -> Adapter:
        """The same update with another scale: what it lacks goes into B, in float32 where B's dtype would round it."""
        if scale == self.scale:
            return self
        exact = self.b.double() * (self.scale / scale)
        kept = exact.to(self.b.dtype)
        return replace(self, b=kept if torch.equal(kept.double(), exact) else exact.float(), scale=scale)

    def update(self) -> Tensor:
        """s · B A in float64, shape (out, in); an embedding's is (embedding_dim, num_embeddings)."""
        a, b = self.a.double(), self.b.double() * self.scale
        if self.splits is None:
            return b @ a
        update = a.new_zeros(self.out, a.shape[1])
        for i, (rows, held) in enumerate(self.splits.spans()):
            torch.mm(b[held], a[i * self.rank : (i + 1) * self.rank], out=update[rows])
        return update


@dataclass(frozen=True)
class Layer:
    """One layer of the result.

    Attributes:
        made: its adapter in the new form.
        sources: the adapters it was made of, each with the layer's row at which its own rows start.
        kind: loralib's name for such a layer.
    """

    made: Adapter
    sources: tuple[tuple[int, Adapter], ...]
    kind: str

    def wanted(self) -> Tensor:
        """The update that the sources stand for, in float64, shape (out, in)."""
        if len(self.sources) == 1 and self.sources[0][1].out == self.made.out:
            return self.sources[0][1].update()
        update = torch.zeros(self.made.out, self.made.a.shape[1], dtype=torch.float64)
        for start, source in self.sources:
            update[start : start + source.out] = source.update()
        return update


def ends_with(name: str, end: str) -> bool:
    """Whether the layer `name` is called `end`, in whole or by its last parts."""
    return name == end or name.endswith(f".{end}")


def splits_of(name: str, fused: Mapping[str, Splits]) -> Splits | None:
    """The splits given for the layer `name`."""
    return next((splits for end, splits in fused.items() if ends_with(name, end)), None)


def unmatched(option: str, ends: Iterable[str], names: Sequence[str]) -> list[str]:
    """A sentence for each name given to `option` that no layer's name ends with."""
    last = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
    lost = [end for end in ends if not any(ends_with(name, end) for name in names)]
    return [f"{option} {end}: no layer with an adapter is called so; there are {last}" for end in lost]
