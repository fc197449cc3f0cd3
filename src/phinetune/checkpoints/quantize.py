"""Loading a checkpoint in 4 or 8 bits through bitsandbytes (QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from phinetune.errors import ModelError

KINDS = ("nf4", "int8")


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """transformers' `BitsAndBytesConfig`: NF4 with double quantisation, or LLM.int8(); products in `dtype`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantization: {kind} needs bitsandbytes; pip install 'phinetune[quant]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(model: Any) -> bool:
    """Whether a model's linear layers hold 4 or 8 bits a weight."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def keep_packing(model: Any) -> None:
    """Have 4-bit layers on a CPU stay as they were loaded.

    With AVX512-BF16, bitsandbytes packs a weight in another order and rounds its scales to bfloat16, for good, the
    first time the layer runs outside training: losses change, and the layer neither trains nor is expanded right
    after that.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
