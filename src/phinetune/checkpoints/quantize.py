"""What it takes to hold a checkpoint in 4 or 8 bits with bitsandbytes (QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from phinetune.errors import ModelError

KINDS = ("nf4", "int8")


def check_quantization(kind: str) -> None:
    """Make sure that a base can be held as `model.quantization` says, before anything slow begins.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if kind != "none" and find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantization: {kind} needs bitsandbytes; pip install 'phinetune[quant]'")


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """transformers' `BitsAndBytesConfig` for a kind of quantisation.

    Args:
        kind: `nf4` (NF4 with double quantisation) or `int8` (LLM.int8()).
        dtype: the dtype of the products of NF4 layers.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    check_quantization(kind)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def why_no_dora(kind: str, device: torch.device) -> str | None:
    """Why DoRA can't be put on a base that is held so; None if it can."""
    if kind != "int8" or device.type != "cpu":
        return None
    return "on a CPU, PEFT loses the scales of an int8 base under DoRA; take nf4, an unquantised base, or LoRA"


def kind_of(model: Any) -> str:
    """How a model's linear layers hold their weights: `none`, `nf4` or `int8`."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    return "int8" if getattr(model, "is_loaded_in_8bit", False) else "none"


def is_quantized(model: Any) -> bool:
    """Whether a model's linear layers hold their weights in 4 or 8 bits."""
    return kind_of(model) != "none"


def scales_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The scales of a model's 4-bit weights, by the names that bitsandbytes gives them. They are no parameters."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and state.nested:
            yield f"{name}.nested_absmax", state.state2.absmax
        elif state is not None:
            yield f"{name}.absmax", state.absmax


def cast_others(model: Any, dtype: torch.dtype) -> None:
    """Cast what is not quantised. If the files hold quantised weights, transformers leaves the others as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def keep_packing(model: Any) -> None:
    """Make 4-bit layers on a CPU stay as they were loaded.

    On a CPU with AVX512-BF16, bitsandbytes packs a weight in another order and rounds its scales to bfloat16 the first
    time that the layer runs outside training. It never changes them back. Losses change, and the layer can no longer
    be trained or expanded correctly.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
