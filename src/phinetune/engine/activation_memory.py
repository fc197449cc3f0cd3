"""Chooses which activations a step keeps for its backward, so that they fit into the free memory."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phinetune.engine.families import is_fused

logger = logging.getLogger(__name__)

RESERVE = 0.15  # the share of the free memory that is left for temporary tensors of the optimizer and the loss
# The share of the rest that activations may take before the outputs of norms and SwiGLU are computed again. At Phi-3
# mini's shape that drops 29% of the activations, and a step takes less than a hundredth more time. If activations take
# less than this share, there is little to drop, and time is worth more.
PLENTY = 0.125
# Where other programs and the files that the system holds share the memory, also no more bytes than this. At the
# starter's shape, 4,000 tokens a step, that costs 3% of the time and saves 16% of all memory (float32, AVX2).
PLENTY_SHARED = 1 << 30
# The memory that the allocator holds for kept activations, divided by their size. glibc's allocator leaves gaps between
# tensors of different lengths; benchmarks.plan measures a third. There are no gaps around tensors of at least MAPPED
# bytes: glibc always maps these by themselves (mallopt(3), M_MMAP_THRESHOLD).
SLACK = 1.3
MAPPED = 32 * 2**20  # bytes
KEPT_SLACK = 1.2  # the same for tensors of any size where their memory is kept (`engine.kept_memory`)
MLP_ROWS = 4096  # tokens for which a layer that is recomputed whole computes its MLP at a time
# An adapter's gradient and AdamW's two moments, in float32.
BYTES_A_TRAINED_PARAMETER = 12


class Level(enum.IntEnum):
    """What a layer keeps for the backward. What it does not keep is computed again.

    KEEP: all activations. CHEAP: all but the outputs of the norms and of SwiGLU. LAYER: only the layer's input.
    """

    KEEP = 0
    CHEAP = 1
    LAYER = 2


@dataclass(frozen=True)
class LayerSizes:
    """How many elements per token one decoder layer keeps at each level.

    With LoRA dropout each projection keeps its adapter's input and a mask, so there is nothing cheap to drop.

    Attributes:
        hidden: features of the hidden states.
        qkv: features of queries, keys and values together.
        attended: features of attention's output, heads · size.
        inner: features inside the MLP, `intermediate_size`.
        dropout: whether LoRA dropout is on.
        inputs: how many layers read the hidden states: qkv and gate_up, or q, k, v and gate, up.
        heads: query heads. Native attention keeps a float32 for each, which counts as two elements.
    """

    hidden: int
    qkv: int
    attended: int
    inner: int
    dropout: bool
    inputs: int = 2
    heads: int = 0

    @classmethod
    def of(cls, config: Any, dropout: bool) -> LayerSizes:
        """Sizes for a model's configuration."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attended = config.num_attention_heads * size
        qkv = attended + 2 * config.num_key_value_heads * size
        inputs = 2 if is_fused(config) else 5
        heads = config.num_attention_heads
        return cls(config.hidden_size, qkv, attended, config.intermediate_size, dropout, inputs, heads)

    @property
    def weights(self) -> int:
        """Elements of a layer's matrices."""
        return self.hidden * self.qkv + self.attended * self.hidden + 3 * self.hidden * self.inner

    def tensors(self, level: Level) -> tuple[int, ...]:
        """Elements per token of each tensor that is kept at a level.

        The copy of its output that torch's fused attention keeps is not counted.
        """
        if level is Level.LAYER:
            return (self.hidden,)
        lasting = (self.hidden, self.qkv, self.attended, self.hidden, 2 * self.inner, 2 * self.heads)
        if self.dropout:
            return lasting + 2 * (*(self.hidden,) * self.inputs, self.attended, self.inner)
        return lasting if level is Level.CHEAP else (*lasting, self.hidden, self.hidden, self.inner)

    def kept(self, level: Level) -> int:
        """Elements per token that are kept at a level."""
        return sum(self.tensors(level))

    def working(self, level: Level) -> int:
        """Elements per token that a layer's backward needs besides: what was not kept, and its parts' gradients."""
        return self.kept(Level.KEEP) - self.kept(level) + self.qkv + 3 * self.inner + 3 * self.hidden


class ActivationMemory:
    """Chooses the level of each layer for a step, given its number of tokens.

    Args:
        setting: engine.activation_memory: auto, none, all, or how many layers to recompute.
        sizes: of one layer.
        layers: how many layers there are.
        width: bytes per element.
        free: bytes of free memory; `auto` takes what of it is not held in reserve.
        shared: whether other programs share this memory, as they do a processor's.
        keeps: whether the memory of large tensors is kept from step to step.
    """

    def __init__(
        self,
        setting: str | int,
        sizes: LayerSizes,
        layers: int,
        width: int,
        free: int,
        *,
        shared: bool = False,
        keeps: bool = False,
    ) -> None:
        self.setting, self.sizes, self.layers, self.width = setting, sizes, layers, width
        self.slack, self.gapless = (KEPT_SLACK, 1 << 62) if keeps else (SLACK, MAPPED)
        self.free = int(free * (1 - RESERVE))
        self.plenty = min(int(self.free * PLENTY), PLENTY_SHARED if shared else self.free)
        self._logged: Sequence[Level] | None = None

    def __call__(self, tokens: int) -> list[Level]:
        """What each layer keeps in a step of `tokens`. The first choice is logged, and any that keeps less later."""
        levels = self.choose(tokens)
        if self._logged is None or sum(levels) > sum(self._logged):
            logger.info("activation memory: %s", self.describe(tokens, levels))
            self._logged = levels
        return levels

    def choose(self, tokens: int) -> list[Level]:
        """What each layer keeps in a step of `tokens`. The first layers keep least: they hold activations longest."""
        if self.setting == "auto":
            return self._fitting(tokens)
        recomputed = {"none": 0, "all": self.layers}.get(str(self.setting))
        count = min(int(self.setting), self.layers) if recomputed is None else recomputed
        return [Level.LAYER] * count + [Level.KEEP] * (self.layers - count)

    def needed(self, tokens: int, levels: Sequence[Level]) -> int:
        """Bytes that a step of `tokens` holds at its peak."""
        return self.kept(tokens, levels) + self.working(tokens, levels)

    def kept(self, tokens: int, levels: Sequence[Level]) -> int:
        """Bytes that a step of `tokens` keeps from forward to backward, the allocator's gaps included."""
        token = tokens * self.width
        held = 0.0
        for level in set(levels):
            sizes = [token * elements for elements in self.sizes.tensors(level)]
            held += levels.count(level) * sum(size if size >= self.gapless else self.slack * size for size in sizes)
        return int(held)

    def working(self, tokens: int, levels: Sequence[Level]) -> int:
        """Bytes that a layer's backward needs besides; the largest value over all layers."""
        return tokens * self.width * max(self.sizes.working(level) for level in levels)

    def _fitting(self, tokens: int) -> list[Level]:
        levels = [Level.KEEP] * self.layers
        if not self.sizes.dropout:
            self._lower(levels, Level.CHEAP, tokens, self.plenty)
        self._lower(levels, Level.LAYER, tokens, self.free)
        return levels

    def _lower(self, levels: list[Level], level: Level, tokens: int, limit: int) -> None:
        """Set one layer after the other to `level`, until the step needs no more than `limit` bytes or all are set."""
        for i in range(self.layers):
            if self.needed(tokens, levels) <= limit:
                return
            levels[i] = level

    def describe(self, tokens: int, levels: Sequence[Level]) -> str:
        """The choice in words, for the log."""
        counts = [sum(level is kind for level in levels) for kind in Level]
        return (
            f"{tokens:,} tokens a step: {counts[0]} of {self.layers} layers keep all, {counts[1]} recompute norms and "
            f"SwiGLU, {counts[2]} are recomputed whole; about {self.needed(tokens, levels) / 2**30:.1f} GiB of "
            f"{self.free / 2**30:.1f} GiB"
        )
