"""Loss and token accuracy of a batch, or of each row. Only some of the logits are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phinetune.engine.choice import has_packed_form
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.packing import conversations

# Positions whose logits are in memory at a time. With a vocabulary of 200,000 their float32 logits are 200 MB.
CHUNK = 256
BATCH = 16  # examples that are scored together, unless the user sets another number


@dataclass
class Score:
    """Sums over labelled tokens. Scores can be added, so the total does not depend on how rows are batched.

    Attributes:
        nll: the summed negative log-likelihood, in nats.
        correct: how many labelled tokens are the model's first choice.
        tokens: how many labelled tokens there are.
    """

    nll: float = 0.0
    correct: int = 0
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.correct + other.correct, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """The mean negative log-likelihood of a labelled token, in nats."""
        return self.nll / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if that overflows."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    @property
    def token_accuracy(self) -> float:
        """The share of labelled tokens that are the model's first choice, from 0 to 1."""
        return self.correct / max(1, self.tokens)


@torch.no_grad()
def score_batch(model: Any, batch: Mapping[str, Any]) -> Score:
    """Score one batch.

    Args:
        model: a causal model, or a PEFT model around one.
        batch: `input_ids`, `attention_mask` and `labels`, each of shape (rows, tokens). Labels are not shifted, and a
            token without a label has -100. In packed rows for transformers' own classes, `position_ids` replaces the
            mask. A packed row of `phinetune.engine.packing` has `segments`, and the model's own loss scores it.
    """
    if "segments" in batch:
        return score_packed(model(**batch))
    labels = batch["labels"][:, 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = core.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    picked = labels != IGNORED
    return _score_tokens(core.get_output_embeddings(), hidden[picked], labels[picked])


def score_packed(out: Any) -> Score:
    """The sums of a `PackedOutput`."""
    return Score(float(out.nll), round(float(out.correct)), round(float(out.count)))


def _score_tokens(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> Score:
    nll, correct = token_scores(head, hidden, labels)
    return Score(float(nll.sum()), int(correct.sum()), labels.numel())


@torch.no_grad()
def token_scores(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of each label in nats (float64), and whether it is the model's first choice.

    The head is applied to `CHUNK` tokens at a time.

    Args:
        head: the output head.
        hidden: the hidden state before each label, shape (tokens, width).
        labels: token ids, shape (tokens).

    Returns:
        both of shape (tokens).
    """
    nll, correct = [labels.new_empty(0, dtype=torch.float64)], [labels.new_empty(0, dtype=torch.bool)]
    for states, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = head(states).float()
        nll.append(F.cross_entropy(logits, wanted, reduction="none").double())
        correct.append(logits.argmax(-1) == wanted)
    return torch.cat(nll), torch.cat(correct)


@torch.no_grad()
def score_rows(
    model: Any,
    rows: Sequence[Encoded],
    batch_size: int | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """The score of each example, in the order of `rows`. Examples of similar length are computed together.

    Args:
        model: a causal model, or a PEFT model around one.
        batch_size: how many examples are computed together; None is `BATCH`.
        on_done: called with the number of examples that have just been scored.
    """
    size = batch_size or BATCH
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    scores = [Score() for _ in rows]
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        parts = [(i, part) for i in chosen for part in conversations(rows[i].to_row())]
        for (i, _), score in zip(parts, _score_conversations(model, [part for _, part in parts]), strict=True):
            scores[i] += score
        on_done(len(chosen))
    return scores


def _score_conversations(model: Any, rows: Sequence[Encoded]) -> list[Score]:
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
    """The hidden state before each label, row after row, shape (labels, width). Computed as one packed row."""
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
    """The same, computed as a padded batch, for transformers' own classes."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    out = core.model(input_ids=ids.to(core.device), attention_mask=mask.to(core.device), use_cache=False)
    states = out.last_hidden_state
    return torch.cat([states[i, _before_labels(row).to(states.device)] for i, row in enumerate(rows)])


def _before_labels(row: Encoded) -> Tensor:
    """The positions in a row whose output predicts a label, shape (labels)."""
    return torch.tensor([i for i, label in enumerate(row.labels[1:]) if label != IGNORED], dtype=torch.long)
