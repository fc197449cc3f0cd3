"""Which activations a step keeps for its backward, within the memory that is free."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

RESERVE = 0.15  # of the free memory: the optimizer's and the loss's temporaries
# Of that, what activations may take before norms and SwiGLU are computed again: at Phi-3 mini's shape that drops 29% of
# them for less than a hundredth of a step's time; where there is little to drop, time is worth more.
PLENTY = 0.125
# What the allocator holds of kept activations over what is alive. glibc's keeps gaps between tensors of unlike
# lengths: a third measured (benchmarks.plan), none where every tensor is mapped by itself, as glibc does with large
# ones whatever it has seen before (mallopt(3), M_MMAP_THRESHOLD).
SLACK = 1.3
MAPPED = 32 * 2**20  # bytes


class Level(enum.IntEnum):
    """What a layer keeps: all; all but what norm and SwiGLU give (computed again); or its input alone."""

    KEEP = 0
    CHEAP = 1
    LAYER = 2


@dataclass(frozen=True)
class LayerSizes:
    """Elements a token that one decoder layer keeps at each level.

    With LoRA dropout each projection keeps what its adapter saw, and a mask, so there is nothing cheap to drop.
    """

    hidden: int
    qkv: int
    attended: int
    inner: int
    dropout: bool

    @classmethod
    def of(cls, config: Any, dropout: bool) -> LayerSizes:
        """Sizes for a `Phi3Config`."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attended = config.num_attention_heads * size
        qkv = attended + 2 * config.num_key_value_heads * size
        return cls(config.hidden_size, qkv, attended, config.intermediate_size, dropout)

    def tensors(self, level: Level) -> tuple[int, ...]:
        """Elements a token of each tensor kept at a level. torch's fused attention keeps its output besides."""
        if level is Level.LAYER:
            return (self.hidden,)
        lasting = (self.hidden, self.qkv, self.attended, self.hidden, 2 * self.inner)
        if self.dropout:
            return lasting + 2 * (self.hidden, self.attended, self.hidden, self.inner)
        return lasting if level is Level.CHEAP else (*lasting, self.hidden, self.hidden, self.inner)

    def kept(self, level: Level) -> int:
        """Elements a token at a level."""
        return sum(self.tensors(level))

    def working(self, level: Level) -> int:
        """Elements a token that a layer's backward needs besides: what it did not keep, and its parts' gradients."""
        return self.kept(Level.KEEP) - self.kept(level) + self.qkv + 3 * self.inner + 3 * self.hidden


class ActivationMemory:
    """Levels for a step of so many tokens; `setting` is auto, none, all or how many layers to recompute.

    Args:
        sizes: of one layer.
        layers: how many there are.
        width: bytes an element.
        free: bytes that activations may take, for auto.
    """

    def __init__(self, setting: str | int, sizes: LayerSizes, layers: int, width: int, free: int) -> None:
        self.setting, self.sizes, self.layers, self.width = setting, sizes, layers, width
        self.free = int(free * (1 - RESERVE))
        self._told: Sequence[Level] | None = None

    def __call__(self, tokens: int) -> list[Level]:
        """What each layer keeps in a step of `tokens`; a choice that keeps less than before is logged."""
        levels = self.choose(tokens)
        if self._told is None or sum(levels) > sum(self._told):
            logger.info("activation memory: %s", self.describe(tokens, levels))
            self._told = levels
        return levels

    def choose(self, tokens: int) -> list[Level]:
        """The first layers are the ones recomputed: their activations would be held longest."""
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
            held += levels.count(level) * sum(size if size >= MAPPED else SLACK * size for size in sizes)
        return int(held)

    def working(self, tokens: int, levels: Sequence[Level]) -> int:
        """Bytes that the backward of the hungriest layer needs besides."""
        return tokens * self.width * max(self.sizes.working(level) for level in levels)

    def _fitting(self, tokens: int) -> list[Level]:
        levels = [Level.KEEP] * self.layers
        if not self.sizes.dropout:
            self._lower(levels, Level.CHEAP, tokens, int(self.free * PLENTY))
        self._lower(levels, Level.LAYER, tokens, self.free)
        return levels

    def _lower(self, levels: list[Level], level: Level, tokens: int, limit: int) -> None:
        """Put layer after layer down to `level` until what the step needs is within `limit`, or all are."""
        for i in range(self.layers):
            if self.needed(tokens, levels) <= limit:
                return
            levels[i] = level

    def describe(self, tokens: int, levels: Sequence[Level]) -> str:
        """The choice in words."""
        counts = [sum(level is kind for level in levels) for kind in Level]
        return (
            f"{tokens:,} tokens a step: {counts[0]} of {self.layers} layers keep all, {counts[1]} recompute norms and "
            f"SwiGLU, {counts[2]} are recomputed whole; about {self.needed(tokens, levels) / 2**30:.1f} GiB of "
            f"{self.free / 2**30:.1f} GiB"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take on `device`; on a CPU no more than its control group allows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    import psutil

    return min(psutil.virtual_memory().available, _group_limit(Path("/sys/fs/cgroup")))


def used_bytes(device: torch.device) -> int:
    """Memory that this process takes on `device`: its peak so far on CUDA, what is resident now elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    import psutil

    return int(psutil.Process().memory_info().rss)


def _group_limit(group: Path) -> int:
    """What is left below the memory limit of this process's control group (version 2); huge where there is none."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62
