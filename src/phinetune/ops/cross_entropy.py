"""The language-model head and its cross-entropy in one, a chunk of logits at a time.

The gradient with respect to the hidden state is computed in the forward, while a chunk's logits are there
(Hsu et al. 2024, Liger Kernel, section 3.2). Only positions that have a label are given at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits alive at a time: 64 MB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of `labels` under softmax(hidden weightᵀ), and how many were the first choice.

    Args:
        hidden: shape (labels, width).
        weight: the head, shape (vocabulary, width).
        labels: token ids, shape (labels).
        weights: how many times each label counts, shape (labels), float32.

    Returns:
        two float32 scalars: Σ weight · nll (differentiable), Σ weight over labels that were the first choice.
    """
    out: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(hidden, weight, labels, weights)  # type: ignore[no-untyped-call]
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradient of hidden, and of the head where it trains; no logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        nll = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros_like(nll)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            log_p = torch.log_softmax(hidden[part] @ weight.t(), dim=-1, dtype=torch.float32)
            picked = log_p.gather(1, labels[part, None]).squeeze(1)
            nll -= torch.dot(picked, weights[part])
            correct += torch.dot((picked == log_p.amax(-1)).float(), weights[part])
            if d_hidden is None and d_weight is None:
                continue
            d_logits = _gradient(log_p, labels[part], weights[part]).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[part]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else (d_hidden * grad).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _gradient(log_p: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """weight · (softmax − one-hot), written over `log_p`."""
    p = log_p.exp_()
    p[torch.arange(len(labels), device=p.device), labels] -= 1.0
    return p.mul_(weights[:, None])
