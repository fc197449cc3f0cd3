"""What an adapter trains beside LoRA's A and B, and whether the base as it is held can be trained so."""

from __future__ import annotations

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from phinetune.checkpoints.prequantized import held_as, is_held_so
from phinetune.checkpoints.quantize import why_no_dora
from phinetune.config.model import ModelSection
from phinetune.engine.families import ModelConfig
from phinetune.engine.peft_variants import refused_starts
from phinetune.errors import ConfigError, at_most
from phinetune.training.rehearsal import adapted_shape
from phinetune.training.settings import Settings


def check_trained_parts(
    settings: Settings, section: ModelSection, shape: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Make sure that all that the adapter trains can be trained, before a weight is loaded.

    Args:
        section: how the base is held.
        shape: the model's configuration.
        device, dtype: of the weights.

    Raises:
        ConfigError: parts are held in 4 or 8 bits, or in a dtype that is too coarse; the error names them.
        ModelError: see `held_as`.
    """
    kind = held_as(section, shape)
    problems = refused_starts(settings.peft, kind)
    reason = why_no_dora(kind, device) if settings.peft.get("use_dora") else None
    if reason:
        problems.append(f"peft_config.use_dora: {reason}")
    if settings.peft.get("modules_to_save") and kind != "none":
        problems += _quantised(settings, shape, kind)
    if dtype == torch.float16:
        problems += _in_float16(settings, shape)
    if problems:
        raise ConfigError(problems)


def _quantised(settings: Settings, shape: ModelConfig, quantization: str) -> list[str]:
    """Linear layers but the head are held in few bits, as whole numbers, and these have no gradient."""
    found = []
    for name, module in adapted_shape(settings, shape, torch.float32).get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper) and not name.endswith("lm_head"):
            parts = module.original_module.named_modules(prefix=name)
            inside = [part for part, one in parts if isinstance(one, nn.Linear) and is_held_so(part, shape)]
            found += [f"peft_config.modules_to_save: {name} is held as {quantization}"] if inside else []
    if not found:
        return []
    rule = "only what keeps 16 or 32 bits can be trained whole (embed_tokens, lm_head, norms)"
    return [*at_most(found, 4), f"{rule}; leave these out, give them LoRA, or hold the base in 16 bits"]


def _in_float16(settings: Settings, shape: ModelConfig) -> list[str]:
    """AdamW's numbers are too small for float16: a division by zero spoils the weights at the first steps."""
    model = adapted_shape(settings, shape, torch.float16)
    names = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if not names:
        return []
    rule = "which spoils them in the first steps; set model.dtype: bfloat16 or float32"
    listed = at_most([name.removeprefix("base_model.model.") for name in names], 4)
    return [f"peft_config: these parts of the model would be trained in float16, {rule}:", *listed]
