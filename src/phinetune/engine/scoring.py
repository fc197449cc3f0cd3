"""Loss and token accuracy of a batch without ever holding all its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Logits alive at a time: 256 positions of a 200k vocabulary in float32 are 200 MB.
CHUNK = 256
IGNORED = -100


@dataclass
class Score:
    """Sums over labelled tokens; scores add up, so batches of any size give the same total.

    Attributes:
        nll: summed negative log-likelihood, in nats.
        correct: tokens that were the model's first choice.
        tokens: labelled tokens.
    """

    nll: float = 0.0
    correct: int = 0
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.correct + other.correct, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a labelled token, in nats."""
        return self.nll / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    @property
    def token_accuracy(self) -> float:
        """Share of labelled tokens that were the model's first choice."""
        return self.correct / max(1, self.tokens)


@torch.no_grad()
def score_batch(model: Any, batch: dict[str, torch.Tensor]) -> Score:
    """Score one batch.

    Args:
        model: a causal model, or a PEFT model around one.
        batch: `input_ids`, `attention_mask` and `labels`, each of shape (rows, tokens); labels not shifted,
            -100 where there is none. Packed rows of transformers come with `position_ids` in place of the mask,
            those of `phinetune.engine.packing` with `segments`, and go through the model's own loss.
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
    """Of each label its negative log-likelihood (float64) and whether it was the first choice; shape (tokens).

    `hidden` (tokens, width) goes through the head `CHUNK` tokens at a time.
    """
    nll, correct = [labels.new_empty(0, dtype=torch.float64)], [labels.new_empty(0, dtype=torch.bool)]
    for states, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = head(states).float()
        nll.append(F.cross_entropy(logits, wanted, reduction="none").double())
        correct.append(logits.argmax(-1) == wanted)
    return torch.cat(nll), torch.cat(correct)
