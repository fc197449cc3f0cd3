"""The peak memory of a training step, by part. What the layers keep is `phinetune.engine.memory`'s own estimate."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trl import SFTConfig

from phinetune.engine.choice import BYTES_A_TRAINED_PARAMETER
from phinetune.engine.kernels.cross_entropy import CHUNK_ELEMENTS
from phinetune.engine.memory import ActivationMemory, LayerSizes, Level
from phinetune.planning.sizes import Sizes

FLOAT32 = 4
# Bytes of state a parameter; others are taken for AdamW, which none of them exceeds.
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
class Step:
    """The largest micro-batch: tokens in its packed row, and labels among them."""

    tokens: int
    labels: int


@dataclass(frozen=True)
class Parts:
    """Bytes at the peak of a step.

    Attributes:
        adapter: its parameters, their gradients, and its copies in the weights' dtype.
        activations: what the layers keep from forward to backward.
        layer: what one layer works with in its backward, a quantised weight expanded included.
        logits: the chunk of logits alive at a time, and the hidden states at labels with their gradient.
    """

    weights: int
    adapter: int
    optimizer: int
    activations: int
    layer: int
    logits: int

    @property
    def total(self) -> int:
        """The peak: the logits are gone when the first layer's backward begins."""
        lasting = self.weights + self.adapter + self.optimizer + self.activations
        return lasting + max(self.layer, self.logits)

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def optimizer_name(args: SFTConfig) -> str:
    """The optimizer as `training_config.optim` names it."""
    return str(getattr(args.optim, "value", args.optim))


def optimizer_bytes(name: str) -> int:
    """Bytes of state that an optimizer keeps of a parameter."""
    return OPTIMIZERS.get(name, ADAMW)


def predict(
    sizes: Sizes, step: Step, setting: str | int, dropout: bool, optimizer: str, free: int
) -> tuple[Parts, list[Level]]:
    """Memory by part, and what each layer keeps, as the engine will choose it.

    Args:
        setting: engine.activation_memory.
        free: bytes that the run may take.
    """
    vocabulary, hidden, width = sizes.config.vocab_size, sizes.config.hidden_size, sizes.width
    layers = ActivationMemory(
        setting,
        LayerSizes.of(sizes.config, dropout),
        sizes.config.num_hidden_layers,
        width,
        free - sizes.weights - sizes.trainable * BYTES_A_TRAINED_PARAMETER,
    )
    levels = layers.choose(step.tokens)
    chunk = min(step.labels, max(1, CHUNK_ELEMENTS // vocabulary)) * vocabulary
    parts = Parts(
        weights=sizes.weights,
        adapter=sizes.trainable * (2 * FLOAT32 + (width if width < FLOAT32 else 0)),
        optimizer=sizes.trainable * optimizer_bytes(optimizer),
        activations=layers.kept(step.tokens, levels),
        layer=layers.working(step.tokens, levels) + sizes.expanded,
        # Half-precision logits have their log-softmax beside them, float32 ones become it.
        logits=chunk * (FLOAT32 if width == FLOAT32 else width + FLOAT32) + 2 * step.labels * hidden * width,
    )
    return parts, levels
