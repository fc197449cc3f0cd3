"""Predicts the peak memory of a training step by part; `phinetune.engine.activation_memory` has what layers keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trl import SFTConfig

from phinetune.engine.activation_memory import BYTES_A_TRAINED_PARAMETER, ActivationMemory, LayerSizes, Level
from phinetune.engine.kernels.cross_entropy import chunk_rows
from phinetune.planning.sizes import Sizes
from phinetune.training.value_rules import plain_name

FLOAT32 = 4  # bytes
# Bytes of state per parameter. An optimizer that is not listed counts as AdamW; none keeps more than AdamW.
OPTIMIZERS = {
    "sgd": 0,
    "adagrad": 4,
    "rmsprop": 4,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
}
ADAMW = 8


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch: how many tokens its packed row has, and how many labels."""

    tokens: int
    labels: int


@dataclass(frozen=True)
class Parts:
    """The memory of a step in bytes, part by part.

    Attributes:
        weights: the base's weights.
        adapter: the adapter's parameters, their gradients, and their copies in the weights' dtype.
        optimizer: the optimizer's state.
        activations: what the layers keep from forward to backward.
        layer: what one layer needs besides in its backward, with one quantised weight expanded.
        logits: the chunk of logits in memory at a time, and the hidden states at labels with their gradient.
    """

    weights: int
    adapter: int
    optimizer: int
    activations: int
    layer: int
    logits: int

    @property
    def total(self) -> int:
        """The peak. The logits are freed before the first backward of a layer, so only the larger of both counts."""
        lasting = self.weights + self.adapter + self.optimizer + self.activations
        return lasting + max(self.layer, self.logits)

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def optimizer_name(args: SFTConfig) -> str:
    """The optimizer's name, as in `training_config.optim`."""
    return plain_name(args.optim)


def optimizer_bytes(name: str) -> int:
    """Bytes of state that an optimizer keeps per parameter."""
    return OPTIMIZERS.get(name, ADAMW)


def predict(
    sizes: Sizes,
    step: MicroBatch,
    setting: str | int,
    dropout: bool,
    optimizer: str,
    free: int,
    *,
    shared: bool = False,
    keeps: bool = False,
) -> tuple[Parts, list[Level]]:
    """The memory of a step by part, and what each layer keeps. The engine itself will choose the same.

    Args:
        setting: engine.activation_memory.
        dropout: whether LoRA dropout is on.
        optimizer: its name.
        free: bytes that the run may take.
        shared: whether other programs share the memory, as they do a processor's.
        keeps: whether the memory of large tensors is kept from step to step.
    """
    vocabulary, hidden, width = sizes.config.vocab_size, sizes.config.hidden_size, sizes.width
    layers = ActivationMemory(
        setting,
        LayerSizes.of(sizes.config, dropout),
        sizes.config.num_hidden_layers,
        width,
        free - sizes.weights - sizes.trainable * BYTES_A_TRAINED_PARAMETER,
        shared=shared,
        keeps=keeps,
    )
    levels = layers.choose(step.tokens)
    chunk = chunk_rows(step.labels, vocabulary) * vocabulary
    parts = Parts(
        weights=sizes.weights,
        adapter=sizes.trainable * (2 * FLOAT32 + (width if width < FLOAT32 else 0)),
        optimizer=sizes.trainable * optimizer_bytes(optimizer),
        activations=layers.kept(step.tokens, levels),
        layer=layers.working(step.tokens, levels) + sizes.expanded,
        # Half-precision products may be taken in float32. The gradient overwrites the logits.
        logits=chunk * FLOAT32 + 2 * step.labels * hidden * width,
    )
    return parts, levels
