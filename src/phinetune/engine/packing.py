"""Conversations packed into one row of tokens without padding, common beginnings computed once.

`pack` makes what `phinetune.engine.phi3` takes. Conversations are sorted, so those that begin alike stand side by
side. Where neighbours share enough, their common tokens become a segment that the rest branches from, and so on within
the branches. A label that several conversations share is kept once. It has a weight, how many they are, and `owners`
says which they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from phinetune.engine.examples import IGNORED, Encoded, common_prefix
from phinetune.engine.segments import SHORTEST_SHARED

WORTH = 0.1  # of a step's tokens: below it the tree isn't worth its narrower products


@dataclass
class _Tree:
    """The row being built: segments (start, stop, parent), their tokens, and each conversation's path through them."""

    rows: Sequence[Sequence[int]]
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    pieces: list[Sequence[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.segments[-1][1] if self.segments else 0

    def add(self, row: int, start: int, stop: int, parent: int) -> int:
        """A segment of the tokens [start, stop) of conversation `row`."""
        self.segments.append((self.size, self.size + stop - start, parent))
        self.pieces.append(self.rows[row][start:stop])
        self.starts.append(start)
        return len(self.segments) - 1

    def places(self, row: int) -> np.ndarray[Any, Any]:
        """Where each token of a conversation lies in the packed row."""
        return np.concatenate([np.arange(*self.segments[i][:2]) for i in self.paths[row]])


def pack(
    rows: Sequence[Encoded], *, share: bool = False, rope_limit: int | None = None, owned: bool = False
) -> dict[str, Tensor]:
    """One step's conversations as a packed row.

    Args:
        rows: each at least one token long.
        share: compute common beginnings once, where that spares enough.
        rope_limit: conversations longer than this rotate by other factors (longrope), so they share only among
            themselves.
        owned: say which conversations each label belongs to.

    Returns:
        `input_ids`, `position_ids` (1, tokens); `segments` (segments, 3); `predicts`, `labels`, `weights` (labels);
        `row_tokens`, the tokens of all conversations, shared or not. With `owned` also `owners` (pairs, 2): a label's
        place and the conversation's, one pair for each label of each conversation; and `conversations`, how many.
    """
    ids = [row.input_ids for row in rows]
    total = sum(map(len, ids))
    tree = _shared(ids, rope_limit) if share and len(ids) > 1 else None
    if tree is None or tree.size > (1 - WORTH) * total:
        tree = _Tree(ids)
        for i, tokens in enumerate(ids):
            tree.paths[i] = [tree.add(i, 0, len(tokens), -1)]
    predicts, labels, weights, places = _labels(tree, rows)
    positions = [np.arange(start, start + len(piece)) for start, piece in zip(tree.starts, tree.pieces, strict=True)]
    packed = {
        "input_ids": torch.from_numpy(np.concatenate([np.asarray(piece) for piece in tree.pieces]))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "segments": torch.tensor(tree.segments),
        "predicts": torch.from_numpy(predicts),
        "labels": torch.from_numpy(labels),
        "weights": torch.from_numpy(weights),
        "row_tokens": torch.tensor(total),
    }
    if owned:
        labelled = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
        owner = np.repeat(np.arange(len(rows)), labelled)
        packed["owners"] = torch.from_numpy(np.stack([places, owner], axis=1))
        packed["conversations"] = torch.tensor(len(rows))
    return packed


def _labels(tree: _Tree, rows: Sequence[Encoded]) -> tuple[np.ndarray[Any, Any], ...]:
    """Positions that predict, what they predict, for how many conversations; and of each conversation's labels, one
    conversation after the other, their places among these.
    """
    at, what = [], []
    for i, row in enumerate(rows):
        labels, places = np.asarray(row.labels[1:], dtype=np.int64), tree.places(i)
        picked = labels != IGNORED
        at.append(places[:-1][picked])
        what.append(labels[picked])
    pairs = np.stack([np.concatenate(at), np.concatenate(what)])
    if tree.size == sum(len(row.input_ids) for row in rows):  # nothing is shared
        return pairs[0], pairs[1], np.ones(pairs.shape[1], dtype=np.float32), np.arange(pairs.shape[1])
    unique, places, counts = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    return unique[0].copy(), unique[1].copy(), counts.astype(np.float32), places.reshape(-1)


def _shared(ids: Sequence[Sequence[int]], rope_limit: int | None) -> _Tree:
    tree = _Tree(ids)
    long = [rope_limit is not None and len(tokens) > rope_limit for tokens in ids]
    for kind in (False, True):
        chosen = sorted((i for i in range(len(ids)) if long[i] is kind), key=lambda i: list(ids[i]))
        _grow(tree, chosen, 0, [])
    return tree


def _grow(tree: _Tree, rows: Sequence[int], depth: int, path: list[int]) -> None:
    """Add conversations that share their first `depth` tokens, which `path` holds already."""
    parent = path[-1] if path else -1
    for group, common in _groups(tree.rows, rows, depth):
        if len(group) == 1 or common == depth:
            for row in group:
                rest = [tree.add(row, depth, len(tree.rows[row]), parent)] if len(tree.rows[row]) > depth else []
                tree.paths[row] = path + rest
            continue
        _grow(tree, group, common, [*path, tree.add(group[0], depth, common, parent)])


def _groups(ids: Sequence[Sequence[int]], rows: Sequence[int], depth: int) -> Iterator[tuple[list[int], int]]:
    """Neighbours that share `SHORTEST_SHARED` tokens or more beyond `depth`, and how many tokens they all share."""
    group: list[int] = []
    common = depth
    for row in rows:
        shared = common_prefix(ids[group[-1]], ids[row]) if group else 0
        if group and shared - depth >= SHORTEST_SHARED:
            common = shared if len(group) == 1 else min(common, shared)
            group.append(row)
            continue
        if group:
            yield group, common
        group, common = [row], depth
    if group:
        yield group, common


class PackedCollator:
    """The examples of a step as one packed row. An example may hold several conversations (`seq_lengths`).

    Args:
        share, rope_limit, owned: see `pack`.
        columns: numbers that each example carries besides; the row has them by name, shape (examples), float32.
    """

    def __init__(
        self, *, share: bool, rope_limit: int | None, owned: bool = False, columns: Sequence[str] = ()
    ) -> None:
        self.share, self.rope_limit, self.owned, self.columns = share, rope_limit, owned, tuple(columns)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [row for example in examples for row in conversations(example)]
        packed = pack(rows, share=self.share, rope_limit=self.rope_limit, owned=self.owned)
        for column in self.columns:
            packed[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        return packed


def conversations(example: dict[str, Any]) -> Iterator[Encoded]:
    """The conversations of an example, one after the other."""
    ids, labels, start = example["input_ids"], example["labels"], 0
    for length in example.get("seq_lengths") or [len(ids)]:
        yield Encoded(ids[start : start + length], labels[start : start + length])
        start += length


def fill_rows(dataset: Dataset | IterableDataset, length: int) -> Dataset | IterableDataset:
    """Conversations put together by best fit until a row has `length` tokens; none is cut (all are shorter)."""
    from trl import pack_dataset

    filled: Dataset | IterableDataset = pack_dataset(
        dataset.select_columns(["input_ids", "labels"]), length, strategy="bfd"
    )
    return filled
