"""Which device and which dtype a model runs in."""

from __future__ import annotations

import torch

from phinetune import processes
from phinetune.engine.kernels import matmul as products
from phinetune.errors import ModelError

# Instruction sets in which a CPU multiplies bfloat16 matrices itself (names of torch.cpu.get_capabilities).
NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def pick_device(name: str = "auto") -> torch.device:
    """The device asked for; `auto` is the one a launcher gave this process, else CUDA, else MPS, else the CPU.

    Raises:
        ModelError: the device is not there.
    """
    if name == "auto":
        own = processes.own_device()
        if own is not None:
            return own
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device: `{name}` is no device; use auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ModelError(f"model.device: `{name}` is not there on this machine; use `auto` or `cpu`")
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and no more slowly than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "mps":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in NATIVE_BF16) and not products.is_slow(torch.bfloat16)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; `auto` is bfloat16 where it is native, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
