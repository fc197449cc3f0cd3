"""The fast engine as one run sets it up: how rows are packed, what is shared, what is kept for the backward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel

from phinetune import processes
from phinetune.engine.activation_memory import BYTES_A_TRAINED_PARAMETER, ActivationMemory, LayerSizes
from phinetune.engine.device_memory import free_bytes
from phinetune.engine.families import is_fused
from phinetune.engine.kept_memory import keeps_memory
from phinetune.engine.kernels.compiled import why_not
from phinetune.engine.lora_layers import give_room, take_room
from phinetune.engine.packed_model import rope_limit
from phinetune.engine.packing import PackedCollator, fill_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastEngine:
    """The fast engine's choices for one run.

    Attributes:
        activation_memory: the configuration's.
        share: compute common beginnings once. Off under LoRA dropout, where each row draws masks of its own.
        fill: tokens that `data.packing: tokens` fills a row up to; None where a row is a conversation.
        dropout: whether LoRA dropout is on.
        compile: compile the element-wise operators.
    """

    activation_memory: str | int
    share: bool
    fill: int | None
    dropout: bool
    compile: bool = False

    def describe(self) -> str:
        """How a step is computed, in words."""
        rows = f"rows filled up to {self.fill} tokens" if self.fill else "a step's chats in one row"
        shared = "common beginnings computed once" if self.share else "no sharing of common beginnings"
        return f"{rows} without padding, {shared}, activation memory {self.activation_memory}"

    def prepare(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The rows that a step counts."""
        return fill_rows(dataset, self.fill) if self.fill else dataset

    def collator(self, config: Any, *, owned: bool = False, columns: Sequence[str] = ()) -> PackedCollator:
        """Makes one packed row of a step's examples.

        Args:
            config: the model's.
            owned, columns: see `PackedCollator`.
        """
        # The model's own residual dropout draws masks for each row, as LoRA dropout does.
        share = self.share and not getattr(config, "resid_pdrop", 0)
        return PackedCollator(share=share, rope_limit=rope_limit(config), owned=owned, columns=columns)

    def set_up(self, model: PeftModel, device: torch.device, *, sharded: bool = False) -> None:
        """Before the first step: compile what can be, and let the decoder keep what fits the memory free now.

        Where base and adapter can be one product, the base's weights get room for it until `give_back`.

        Args:
            sharded: whether several processes train, so that the weights may be spread over them.
        """
        core: Any = model.get_base_model()
        decoder = core.model
        if is_fused(decoder.config) and not sharded and not self.dropout:
            give_room(model)
        if self.compile:
            reason = why_not()
            if reason:
                logger.warning("engine.compile: off, since nothing can be compiled here (%s)", reason)
            else:
                decoder.compile_operators()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        decoder.activation_levels = ActivationMemory(
            self.activation_memory,
            LayerSizes.of(decoder.config, self.dropout),
            len(decoder.layers),
            decoder.embed_tokens.weight.element_size(),
            _free_share(device) - trained * BYTES_A_TRAINED_PARAMETER,
            shared=device.type == "cpu",
            keeps=keeps_memory(device),
        )

    def give_back(self, model: PeftModel) -> None:
        """After the last step: the base's weights lie as any others do."""
        take_room(model)


def _free_share(device: torch.device) -> int:
    """What is free for this process. Processes on a CPU share its memory, as if all were on one machine."""
    return free_bytes(device) // (processes.count() if device.type == "cpu" else 1)
