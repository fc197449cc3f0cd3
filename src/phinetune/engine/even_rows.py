"""Packed rows filled up to lengths that come again.

oneDNN, which multiplies bfloat16 on processors that can, compiles a product anew for each number of rows. That takes
some 3 ms a product, and a training step has about 40 kinds of products; at the starter's size that is a tenth of a step
or more. Steps differ in length, and oneDNN keeps a thousand products, so nearly every step would wait. Here rows get
some tokens more, and some labels, that nobody reads. For large models these would cost more than they save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.activation_memory import LayerSizes
from phinetune.engine.kernels import matmul

LEAST = 64  # lengths are multiples of this, and of the power of two that is an eighth of them or less
# The most multiplications of weights by tokens that nobody reads: about what oneDNN multiplies while it compiles.
MOST = 1 << 34


def evened(row: dict[str, Any], config: Any, like: Tensor) -> dict[str, Any]:
    """A packed row of an even length, with an even number of labels.

    Args:
        row: `input_ids` and `position_ids` (1, tokens), `segments` (segments, 3), `predicts` and `labels` (labels);
            `weights` (labels) where it has them. See `phinetune.engine.packing`.
        config: the model's.
        like: one of the model's weights.

    Returns:
        the row with tokens in a segment of their own behind all others, and labels behind all others: they have a
        weight of 0, and no conversation. Nothing is added where nothing is compiled for a length.
    """
    made, tokens, labels = dict(row), row["input_ids"].shape[1], len(row["labels"])
    more, more_labels = added(tokens, labels, config, like)
    if more:
        device = row["segments"].device
        made["input_ids"] = F.pad(row["input_ids"], (0, more))
        made["position_ids"] = torch.cat([row["position_ids"], torch.arange(more, device=device)[None]], dim=1)
        segment = torch.tensor([[tokens, tokens + more, -1]], device=device)
        made["segments"] = torch.cat([row["segments"], segment])
    for name in ("predicts", "labels", "weights"):
        if more_labels and name in row:
            made[name] = F.pad(row[name], (0, more_labels))
    return made


def added(tokens: int, labels: int, config: Any, like: Tensor) -> tuple[int, int]:
    """How many tokens and labels a packed row of so many gets."""
    if not _compiles(like):
        return 0, 0
    layers = config.num_hidden_layers * LayerSizes.of(config, dropout=False).weights
    return missing(tokens, layers), missing(labels, config.vocab_size * config.hidden_size)


def missing(count: int, weights: int) -> int:
    """How many rows a product lacks to an even number; 0 if they would cost too much.

    Args:
        count: rows of the product.
        weights: elements of all that the rows are multiplied with.
    """
    step = max(LEAST, (1 << count.bit_length()) >> 4)
    lacking = -count % step
    return lacking if lacking * weights <= MOST else 0


def _compiles(like: Tensor) -> bool:
    """Whether oneDNN multiplies this dtype here: MKL, which multiplies float32, compiles nothing."""
    return like.device.type == "cpu" and like.dtype in matmul.HALF_DTYPES and matmul.product_dtype(like) is like.dtype
