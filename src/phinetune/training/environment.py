"""Describes the machine and the versions of a run, for its report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch
from transformers import TrainingArguments

from phinetune.version import VERSION, library_versions


def describe_environment(args: TrainingArguments) -> dict[str, str]:
    """Names and values for a person to read: device, processor, memory, system, versions."""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    return {
        "device": _device(args.device),
        "processes": str(args.world_size),
        "training precision": precision,
        "processor": f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "phinetune": VERSION,
        **library_versions(),
    }


def _device(device: torch.device) -> str:
    return f"{device}: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _processor() -> str:
    """The processor's name from /proc/cpuinfo, because Python often knows only its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
