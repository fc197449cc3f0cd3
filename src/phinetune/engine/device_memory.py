"""How many bytes of a device's memory are free, and how many this process takes."""

from __future__ import annotations

from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could still take on `device`. On a CPU they are limited by its control group, too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    import psutil

    return min(psutil.virtual_memory().available, _left_in_group(Path("/sys/fs/cgroup")))


def used_bytes(device: torch.device) -> int:
    """Bytes that this process takes on `device`: on CUDA the peak so far, elsewhere what it takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    import psutil

    return int(psutil.Process().memory_info().rss)


def _left_in_group(group: Path) -> int:
    """Bytes left below the memory limit of a control group (version 2). A huge number if it has no limit.

    Args:
        group: the group's folder.
    """
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62
