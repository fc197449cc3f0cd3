"""The parts of a conversion: the adapter of one layer, the splits of a fused layer, and layers found by their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Splits:
    """The splits of a fused layer.

    Attributes:
        rows: the rows of each split.
        adapted: whether each split has an adapter.
    """

    rows: tuple[int, ...]
    adapted: tuple[bool, ...]

    @property
    def out(self) -> int:
        """Rows of the whole layer."""
        return sum(self.rows)

    @property
    def adapted_rows(self) -> int:
        """Rows of loralib's lora_B, which are those of the adapted splits."""
        return sum(rows for rows, adapted in zip(self.rows, self.adapted, strict=True) if adapted)

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """For each adapted split, its rows in the layer and its rows in loralib's lora_B."""
        in_layer = in_b = 0
        for rows, adapted in zip(self.rows, self.adapted, strict=True):
            if adapted:
                yield slice(in_layer, in_layer + rows), slice(in_b, in_b + rows)
                in_b += rows
            in_layer += rows


@dataclass(frozen=True)
class Adapter:
    """The adapter of one layer, as a file holds it.

    Attributes:
        a, b: LoRA's matrices, (r, in) and (out, r). An embedding's are (r, num_embeddings) and (embedding_dim, r). With
            `splits` they are (g·r, in) and (rows of the g adapted splits, r).
        scale: s in s · B A.
        embedding: whether the layer is an embedding.
        splits: the splits of loralib's `MergedLinear`; None for every other layer.
    """

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False
    splits: Splits | None = None

    @property
    def rank(self) -> int:
        """The r that the layer's constructor takes."""
        return self.b.shape[1]

    @property
    def out(self) -> int:
        """Number of rows of the update."""
        return self.splits.out if self.splits else self.b.shape[0]

    def with_scale(self, scale: float) -> Adapter:
        """The same update with another scale.

        B is multiplied by the ratio of the two scales. It becomes float32 if its own dtype would round the result.
        """
        if scale == self.scale:
            return self
        exact = self.b.double() * (self.scale / scale)
        cast = exact.to(self.b.dtype)
        return replace(self, b=cast if torch.equal(cast.double(), exact) else exact.float(), scale=scale)

    def update(self) -> Tensor:
        """s · B A in float64, shape (out, in); an embedding's is (embedding_dim, num_embeddings)."""
        a, b = self.a.double(), self.b.double() * self.scale
        if self.splits is None:
            return b @ a
        update = a.new_zeros(self.out, a.shape[1])
        for i, (rows, rows_of_b) in enumerate(self.splits.spans()):
            torch.mm(b[rows_of_b], a[i * self.rank : (i + 1) * self.rank], out=update[rows])
        return update


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer of the result.

    Attributes:
        adapter: the adapter in the new form.
        sources: the adapters that it was made from, each with the row of the layer at which its own rows start.
        kind: the layer's kind for the report: loralib's class, or the last part of the layer's name.
    """

    adapter: Adapter
    sources: tuple[tuple[int, Adapter], ...]
    kind: str

    def wanted(self) -> Tensor:
        """The update of all the sources together, in float64, shape (out, in)."""
        if len(self.sources) == 1 and self.sources[0][1].out == self.adapter.out:
            return self.sources[0][1].update()
        update = torch.zeros(self.adapter.out, self.adapter.a.shape[1], dtype=torch.float64)
        for start, source in self.sources:
            update[start : start + source.out] = source.update()
        return update


def ends_with(name: str, end: str) -> bool:
    """Whether `end` is the whole name of a layer, or its last parts."""
    return name == end or name.endswith(f".{end}")


def last_part(name: str) -> str:
    """The last part of a layer's name, such as `q_proj`."""
    return name.rpartition(".")[-1]


def splits_of(name: str, fused: Mapping[str, Splits]) -> Splits | None:
    """The splits that are given for the layer `name`; None if there are none."""
    return next((splits for end, splits in fused.items() if ends_with(name, end)), None)


def unmatched(option: str, ends: Iterable[str], names: Sequence[str]) -> list[str]:
    """A problem for each name given to `option` that is not the end of any layer's name."""
    known = ", ".join(sorted({last_part(name) for name in names}))
    unknown = [end for end in ends if not any(ends_with(name, end) for name in names)]
    return [f"{option} {end}: no layer with an adapter has this name; there are {known}" for end in unknown]
