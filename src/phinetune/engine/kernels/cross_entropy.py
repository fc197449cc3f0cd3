"""The language-model head and its cross-entropy in one, a chunk of logits at a time.

Only positions that have a label are given at all. The gradient of the hidden states is computed in the forward, while a
chunk's logits are there (Hsu et al. 2024, Liger Kernel, section 3.2). `linear_cross_entropy` gives one sum.
`linear_log_probs` gives a number a label. What their gradients will be is not known in the forward; but each only
scales a row of the hidden states' gradient. The gradient of a head that trains adds rows up, so for that the backward
computes the logits again. `linear_label_numbers` also tells how the logits are spread, while they are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.kernels.chunks import row_chunks
from phinetune.engine.kernels.matmul import BLOCK_ELEMENTS, accumulator, product_dtype, read_blocks, round_into
from phinetune.engine.kernels.native.operator import Operator, drawn

CHUNK_ELEMENTS = 1 << 25  # logits alive at a time: 128 MB in float32


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
    wanted = torch.is_grad_enabled()
    out: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(hidden, weight, labels, weights, wanted)  # type: ignore[no-untyped-call]
    return out


def linear_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each label under softmax(hidden weightᵀ), and whether it was the first choice.

    Args:
        hidden: shape (labels, width).
        weight: the head, shape (vocabulary, width).
        labels: token ids, shape (labels).

    Returns:
        shape (labels), float32, differentiable in hidden and in a head that trains; shape (labels), float32, 1 or 0.
    """
    wanted = torch.is_grad_enabled()
    log_probs, first, _, _ = _LinearLogProbs.apply(hidden, weight, labels, False, wanted)  # type: ignore[no-untyped-call]
    return log_probs, first


def linear_label_numbers(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `linear_log_probs` gives, and how the logits that each label is chosen from are spread.

    Returns:
        the log-probabilities and the first choices; then, without gradients, the entropy of softmax(hidden weightᵀ) in
        nats and the mean logit over the vocabulary. Each has shape (labels), float32.
    """
    wanted = torch.is_grad_enabled()
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _LinearLogProbs.apply(hidden, weight, labels, True, wanted)  # type: ignore[no-untyped-call]
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradient of hidden, and of the head where it trains; no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        # Under no_grad the flags still say what would need a gradient.
        needs_hidden, needs_weight = (wanted and needs for needs in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        nll = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros_like(nll)
        learns = d_hidden is not None or d_weight is not None
        for part, seen, logits in _chunks(hidden, weight, len(labels)):
            log_probs, first = weights.new_empty(2, len(seen)).unbind()
            _cross_entropy_(logits, labels[part], weights[part] if learns else None, log_probs, first)
            nll -= torch.dot(log_probs, weights[part])
            correct += torch.dot(first, weights[part])
            if learns:
                _add_gradients(logits, seen, weight, d_hidden, d_weight, part)
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
            None,
        )


class _LinearLogProbs(torch.autograd.Function):
    """Keeps each row's gradient of hidden for a log-probability that pulls by 1; no logits.

    With a head that trains it keeps what it was given.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, spread: bool, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        needs_hidden, ctx.again = (wanted and needs for needs in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if needs_hidden and not ctx.again else None
        found = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        first = torch.empty_like(found)
        more = (torch.empty_like(found), torch.empty_like(found)) if spread else None
        for part, seen, logits in _chunks(hidden, weight, len(labels)):
            if more or d_hidden is None:
                _cross_entropy_(logits, labels[part], None, found[part], first[part])
            if more:
                _spread(logits, labels[part], found[part], *(one[part] for one in more))
            if d_hidden is not None:
                _cross_entropy_(logits, labels[part], torch.ones_like(found[part]), found[part], first[part])
                _add_gradients(logits, seen, weight, d_hidden, None, part)
        ctx.save_for_backward(*((hidden, weight, labels) if ctx.again else (d_hidden,)))
        ctx.mark_non_differentiable(first, *(more or ()))
        return found, first, *(more or (None, None))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        pulls = -grad.contiguous()
        if not ctx.again:
            (d_hidden,) = ctx.saved_tensors
            return (d_hidden * pulls[:, None]).to(d_hidden.dtype), None, None, None, None
        hidden, weight, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part, seen, logits in _chunks(hidden, weight, len(labels)):
            _cross_entropy_(logits, labels[part], pulls[part], *torch.empty_like(pulls[part].expand(2, -1)))
            _add_gradients(logits, seen, weight, d_hidden, d_weight, part)
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def chunk_rows(count: int, vocabulary: int) -> int:
    """How many labels have their logits at a time: all chunks but the last have as many, and it has hardly fewer.

    A short last chunk would read the whole head for a few labels.
    """
    most = max(1, CHUNK_ELEMENTS // vocabulary)
    chunks = -(-count // most) or 1
    return -(-count // chunks)


def _chunks(hidden: Tensor, weight: Tensor, count: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(labels, their hidden states in the products' dtype, logits) of a chunk at a time.

    The next chunk overwrites the logits.
    """
    work = product_dtype(hidden)
    rows = chunk_rows(count, weight.shape[0])
    # Made once: fresh pages for every chunk take longer than softmax.
    logits = hidden.new_empty(rows, weight.shape[0], dtype=work)
    for start in range(0, count, max(1, rows)):
        part = slice(start, min(start + rows, count))
        size = part.stop - start
        seen = hidden[part].to(work)
        for columns, block in _blocks(weight, work):
            torch.mm(seen, block.t(), out=logits[:size, columns])
        yield part, seen, logits[:size]


def _add_gradients(
    d_logits: Tensor, seen: Tensor, weight: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, part: slice
) -> None:
    """A chunk's gradients into their places."""
    if d_hidden is not None:
        _times(d_logits, weight, d_hidden[part])
    if d_weight is not None:
        d_weight += d_logits.t() @ seen


def _blocks(weight: Tensor, work: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows in the dtype of the products: at once if it is in it, else block by block."""
    return read_blocks(weight, None if weight.dtype == work else BLOCK_ELEMENTS, work)


def _times(d_logits: Tensor, weight: Tensor, into: Tensor) -> None:
    """d_logits · weight, rounded into its place."""
    total = accumulator(into, d_logits.dtype)
    for rows, block in _blocks(weight, d_logits.dtype):
        total.addmm_(d_logits[:, rows], block)
    round_into(total, into)


def _by_torch(logits: Tensor, labels: Tensor, weights: Tensor | None, log_probs: Tensor, first: Tensor) -> None:
    """Write each label's log-probability, and 1 where it is the first of the largest logits, else 0.

    With `weights`, the logits become their gradient, weight · (softmax − one-hot), which is computed in float32.
    """
    for rows in row_chunks(logits):
        seen, own = logits[rows], labels[rows, None]
        first[rows] = (seen.argmax(-1) == own[:, 0]).to(first.dtype)
        log_p = torch.log_softmax(seen, dim=-1, dtype=torch.float32)
        log_probs[rows] = log_p.gather(1, own)[:, 0]
        if weights is not None:
            p = log_p.exp_()
            p[torch.arange(len(p), device=p.device), own[:, 0]] -= 1.0
            seen.copy_(p.mul_(weights[rows, None]))


def _spread_by_torch(logits: Tensor, labels: Tensor, log_probs: Tensor, entropy: Tensor, mean: Tensor) -> None:
    """Write the entropy of softmax(logits), in nats, and the mean logit of each row; `log_probs` are its label's."""
    for rows in row_chunks(logits):
        seen = logits[rows].float()
        log_z = seen.gather(1, labels[rows, None]) - log_probs[rows, None]
        mean[rows] = seen.mean(-1)
        log_p = seen - log_z
        entropy[rows] = -torch.linalg.vecdot(log_p.exp(), log_p)


def _sample(kind: torch.dtype) -> tuple[Tensor, ...]:
    (logits,) = drawn((32, 32064), kind=kind)
    labels = torch.arange(32)
    return logits, labels, torch.ones(32), torch.empty(32), torch.empty(32)


_cross_entropy_ = Operator("cross_entropy_", _by_torch, _sample)


def _spread_sample(kind: torch.dtype) -> tuple[Tensor, ...]:
    logits, labels, _, entropy, mean = _sample(kind)
    return logits, labels, logits.log_softmax(-1, dtype=torch.float32).gather(1, labels[:, None])[:, 0], entropy, mean


_spread = Operator("spread", _spread_by_torch, _spread_sample)
