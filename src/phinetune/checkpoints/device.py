"""Picks the device that a model runs on, and its dtype."""

from __future__ import annotations

import torch

from phinetune import processes
from phinetune.engine.kernels import matmul
from phinetune.errors import ModelError

# Instruction sets with which a CPU multiplies bfloat16 matrices in hardware (names of torch.cpu.get_capabilities).
NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def pick_device(name: str = "auto") -> torch.device:
    """The device with this name.

    `auto` is the device that a launcher gave this process. Without a launcher it is CUDA, else MPS, else the CPU.

    Raises:
        ModelError: there is no such device on this machine.
    """
    if name == "auto":
        given = processes.own_device()
        if given is not None:
            return given
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device: `{name}` is no device; use auto, cpu, cuda, cuda:N or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ModelError(f"model.device: this machine has no device `{name}`; use `auto` or `cpu`")
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and no more slowly than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "mps":
        return False
    capabilities = torch.cpu.get_capabilities()
    has_instructions = any(capabilities.get(name, False) for name in NATIVE_BF16)
    return has_instructions and not matmul.is_slower_than_float32(torch.bfloat16)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype with this name. `auto` is bfloat16 if the device multiplies it natively, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
