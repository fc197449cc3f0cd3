"""What the packed decoder gives: sums over a row's labels, or numbers of each conversation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class PackedOutput(ModelOutput):
    """Sums over the labels of a packed row, float32 scalars. A label that n conversations share counts n times.

    Attributes:
        nll: the negative log-likelihood in nats; differentiable.
        correct: how many labels are the model's first choice.
        count: how many labels there are.
    """

    nll: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None


@dataclass
class ConversationOutput(ModelOutput):
    """Sums over the labels of each conversation in a packed row, each of shape (conversations), float32.

    Attributes:
        log_probs: the log-probabilities of its labels, in nats; differentiable.
        correct: how many of its labels are the model's first choice.
        count: how many labels it has.
        entropy: of the distributions that its labels are chosen from, in nats; None where `spread` was not asked for.
        logits: the mean logits over the vocabulary there; None as well.
    """

    log_probs: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None
    entropy: Tensor | None = None
    logits: Tensor | None = None
