"""Which engine a run trains with: the fast one, or transformers and PEFT as they are where it has no form."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel

from phinetune import processes
from phinetune.config.run import RunConfig
from phinetune.engine.kernels.compiled import why_not
from phinetune.engine.memory import ActivationMemory, LayerSizes, free_bytes
from phinetune.engine.packing import PackedCollator, fill_rows
from phinetune.engine.phi3 import rope_limit
from phinetune.training.settings import Settings

logger = logging.getLogger(__name__)

# An adapter's gradient, and AdamW's two moments, in float32.
BYTES_A_TRAINED_PARAMETER = 12

# What needs a whole batch's logits, embeddings or activations in transformers' own form.
PLAIN_TRAINING: dict[str, tuple[Any, ...]] = {
    "loss_type": ("nll", "chunked_nll"),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),
    "activation_offloading": (False,),
    "use_liger_kernel": (False,),
    "fp16": (False,),
    "packing_strategy": ("bfd",),
    "deepspeed": (None,),
    "fsdp": (None, False, "", []),
}
# LoRA variants that read more than a layer's input, or replace more than linear layers.
PLAIN_PEFT = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
)


def why_plain(config: RunConfig, settings: Settings, dtype: torch.dtype) -> str | None:
    """What makes this run train without the fast engine; None if nothing does.

    Args:
        dtype: the weights'.
    """
    if config.engine.kind == "plain":
        return "engine: plain"
    for key, fine in PLAIN_TRAINING.items():
        if settings.training.get(key, fine[0]) not in fine:
            return f"training_config.{key}"
    if settings.training.get("bf16") and dtype != torch.bfloat16:
        return f"training_config.bf16 over {dtype} weights (model.dtype: bfloat16 has a fast form)"
    return next((f"peft_config.{key}" for key in PLAIN_PEFT if settings.peft.get(key)), None)


@dataclass(frozen=True)
class Engine:
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

    @classmethod
    def of(cls, config: RunConfig, settings: Settings) -> Engine:
        """The engine that a configuration asks for."""
        dropout = bool(settings.peft.get("lora_dropout"))
        by_tokens = config.data.packing == "tokens" or bool(settings.training.get("packing"))
        memory = config.engine.activation_memory
        share = config.engine.share_prefixes and not dropout
        compile = config.engine.compile or bool(settings.training.get("torch_compile"))
        return cls(memory, share, settings.max_length if by_tokens else None, dropout, compile)

    def prepare(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The rows that a step counts."""
        return fill_rows(dataset, self.fill) if self.fill else dataset

    def collator(self, model: Any) -> PackedCollator:
        """Makes a packed row of a step's conversations."""
        # The model's own residual dropout draws masks for each row, as LoRA dropout does.
        return PackedCollator(share=self.share and not model.config.resid_pdrop, rope_limit=rope_limit(model.config))

    def set_up(self, model: PeftModel, device: torch.device) -> None:
        """Before the first step: compile what can be, and let the decoder keep what fits the memory free now."""
        core: Any = model.get_base_model()
        decoder = core.model
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
        )


def _free_share(device: torch.device) -> int:
    """What is free for this process; processes on a CPU share its memory, as if all were on one machine."""
    return free_bytes(device) // (processes.count() if device.type == "cpu" else 1)
