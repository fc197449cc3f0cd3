"""Loss and token accuracy of each held-out row, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phinetune.chat.encoder import Encoded
from phinetune.checkpoints.load import has_packed_form
from phinetune.engine.scoring import IGNORED, Score, token_scores

BATCH = 16  # rows computed together unless the user says otherwise


@torch.no_grad()
def score_rows(
    model: Any,
    rows: Sequence[Encoded],
    batch_size: int | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """The score of each row, in their order; rows of like length are computed together.

    Args:
        batch_size: rows computed together; None is `BATCH`.
    """
    size = batch_size or BATCH
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        scores.update(zip(chosen, _score_batch(model, [rows[i] for i in chosen]), strict=True))
        on_done(len(chosen))
    return [scores[i] for i in range(len(rows))]


def _score_batch(model: Any, rows: Sequence[Encoded]) -> list[Score]:
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = _packed(core, rows) if has_packed_form(model) else _padded(core, rows)
    counts = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
    labels = torch.tensor([label for row in rows for label in row.labels[1:] if label != IGNORED], dtype=torch.long)
    nll, correct = token_scores(core.get_output_embeddings(), hidden, labels.to(hidden.device))
    return [
        Score(float(part.sum()), int(right.sum()), len(part))
        for part, right in zip(nll.split(counts), correct.split(counts), strict=True)
    ]


def _packed(core: Any, rows: Sequence[Encoded]) -> Tensor:
    """Hidden states before each label, row after row, shape (labels, width); without any padding."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    stops = lengths.cumsum(0)
    starts = stops - lengths
    segments = torch.stack([starts, stops, torch.full_like(starts, -1)], dim=1)
    ids = torch.tensor([token for row in rows for token in row.input_ids])
    positions = torch.cat([torch.arange(length) for length in lengths])
    predicts = torch.cat([_before_labels(row) + start for row, start in zip(rows, starts, strict=True)])
    device = core.device
    states: Tensor = core.model.packed(ids.to(device), positions.to(device), segments, predicts.to(device))
    return states


def _padded(core: Any, rows: Sequence[Encoded]) -> Tensor:
    """The same from a padded batch, as transformers' own classes take it."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    out = core.model(input_ids=ids.to(core.device), attention_mask=mask.to(core.device), use_cache=False)
    states = out.last_hidden_state
    return torch.cat([states[i, _before_labels(row).to(states.device)] for i, row in enumerate(rows)])


def _before_labels(row: Encoded) -> Tensor:
    """Positions whose output predicts a label."""
    return torch.tensor([i for i, label in enumerate(row.labels[1:]) if label != IGNORED], dtype=torch.long)
