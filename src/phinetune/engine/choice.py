"""Fast or plain: which engine computes the steps of a run. It is decided here alone, and the reason is kept.

Fast is this package's engine: packed rows and functions of its own. Plain is transformers and PEFT as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from phinetune.config.run import RunConfig
from phinetune.engine import phi3, split_models
from phinetune.engine.families import ModelConfig, is_fused, transformers_class
from phinetune.engine.fast_engine import FastEngine
from phinetune.engine.packed_model import PackedCausalLM
from phinetune.engine.peft_variants import not_fast

logger = logging.getLogger(__name__)

# The values of training_config that the fast engine takes, the default first. Any other value needs a whole batch's
# logits, embeddings or activations in transformers' own form.
FAST_VALUES: dict[str, tuple[Any, ...]] = {
    "loss_type": ("nll", "chunked_nll"),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),
    "activation_offloading": (False,),
    "fp16": (False,),
    "packing_strategy": ("bfd",),
    "deepspeed": (None,),
}


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a run.

    Attributes:
        fast: the fast engine as the run sets it up; None where the plain engine trains.
        reason: what makes the run train on the plain engine; None where nothing does.
    """

    fast: FastEngine | None
    reason: str | None

    def describe(self) -> str:
        """The choice in one line."""
        if self.fast is None:
            why = f": {self.reason}" if self.reason else ""
            return f"engine: plain (transformers and PEFT as they are){why}"
        return f"engine: fast: {self.fast.describe()}"


def choose_engine(
    config: RunConfig,
    training: Mapping[str, Any],
    peft: Mapping[str, Any],
    max_length: int | None,
    dtype: torch.dtype,
    shape: ModelConfig,
) -> EngineChoice:
    """The engine that a configuration asks for, or the plain one with the reason.

    Args:
        training, peft: both dictionaries, validated.
        max_length: tokens that a conversation may have; None is no limit.
        dtype: the weights'.
        shape: the model's configuration.
    """
    reason = _why_plain(config, training, peft, dtype) or phi3.missing_form(shape)
    if reason:
        return EngineChoice(None, reason)
    dropout = bool(peft.get("lora_dropout"))
    by_tokens = config.data.packing == "tokens" or bool(training.get("packing"))
    fast = FastEngine(
        activation_memory=config.engine.activation_memory,
        share=config.engine.share_prefixes and not dropout,
        fill=max_length if by_tokens else None,
        dropout=dropout,
        compile=config.engine.compile or bool(training.get("torch_compile")),
    )
    return EngineChoice(fast, None)


def _why_plain(
    config: RunConfig, training: Mapping[str, Any], peft: Mapping[str, Any], dtype: torch.dtype
) -> str | None:
    if config.engine.kind == "plain":
        return "engine: plain"
    for key, taken in FAST_VALUES.items():
        if training.get(key, taken[0]) not in taken:
            return f"training_config.{key}"
    if training.get("bf16") and dtype != torch.bfloat16:
        return f"training_config.bf16 over {dtype} weights (model.dtype: bfloat16 has a fast form)"
    return next((f"peft_config.{key}" for key in not_fast(peft)), None)


def model_class(config: ModelConfig, *, fast: bool) -> type[PreTrainedModel]:
    """The class to load a model as: the one with a packed form if `fast` asks for it and the model has one.

    A model that has none is loaded as transformers' own, and a line in the log says why.
    """
    reason = phi3.missing_form(config) if fast else None
    if reason:
        logger.warning("engine: %s has no fast form, so transformers' own model is used", reason)
    if not fast or reason:
        return transformers_class(config)
    return phi3.Phi3ForCausalLM if is_fused(config) else split_models.packed_class(config.model_type)


def has_packed_form(model: object) -> bool:
    """Whether a model, or the base of a PEFT model, takes packed rows."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return isinstance(core, PackedCausalLM)
