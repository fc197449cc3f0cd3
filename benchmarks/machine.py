"""What a benchmark ran on: the instruction set that its products used, or the CUDA device."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# From the weakest to the strongest; a processor has all sets up to its own.
LADDER = ("DEFAULT", "AVX2", "AVX512", "AVX512-BF16", "AMX")
UNKNOWN = "unknown"
# What a user may limit: ATen's operators, oneDNN's products.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
PEERS = ("torch", "transformers", "peft", "trl", "liger-kernel", "xllamacpp")


def instruction_set(device: torch.device | None = None) -> str:
    """The name of what computes: one of `LADDER` on an x86 processor, else the architecture or the CUDA device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine()
    flags = _field("/proc/cpuinfo", "flags").split()
    return named(flags, torch.backends.cpu.get_cpu_capability(), os.environ)


def named(flags: Iterable[str], capability: str, environment: Mapping[str, str]) -> str:
    """One of `LADDER`.

    Args:
        flags: the processor's, as /proc/cpuinfo has them.
        capability: what ATen's operators use: DEFAULT, AVX2 or AVX512.
        environment: where a user may have limited oneDNN's products.
    """
    has = set(flags)
    found = LADDER.index(capability) if capability in LADDER else 0
    if capability == "AVX512" and "avx512_bf16" in has:
        found = LADDER.index("AMX" if {"amx_tile", "amx_bf16"} <= has else "AVX512-BF16")
    return LADDER[min(found, _limit(environment.get("ONEDNN_MAX_CPU_ISA", "")))]


def _limit(setting: str) -> int:
    """The place in `LADDER` of a value of ONEDNN_MAX_CPU_ISA."""
    setting = setting.upper()
    if not setting or "AMX" in setting or setting in ("ALL", "DEFAULT"):
        return len(LADDER) - 1
    if setting.startswith("AVX512"):
        return LADDER.index("AVX512-BF16" if "BF16" in setting or "FP16" in setting else "AVX512")
    return LADDER.index("AVX2" if setting.startswith("AVX2") else "DEFAULT")


def slug(instructions: str) -> str:
    """The name as a file's: lower case, everything that is no letter or digit a hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", instructions.lower()).strip("-")


def machine(dtype: str, device: torch.device | None = None) -> dict[str, Any]:
    """What was measured on."""
    gpu = device is not None and device.type == "cuda"
    memory = _field("/proc/meminfo", "MemTotal").split() or ["0"]
    found = {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "instructions": instruction_set(device),
        "threads": torch.get_num_threads() if gpu else min(2, os.cpu_count() or 1),
        "memory_gb": round(int(memory[0]) * 1024 / 1e9, 1),
        "dtype": dtype,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if gpu:
        found["device_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
    return found | {name: os.environ[name] for name in LIMITS if name in os.environ}


def versions() -> dict[str, str]:
    """Of the libraries that are measured, those that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _field(file: str, name: str) -> str:
    """The value behind `name:` in a file of the kernel's; empty where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")
