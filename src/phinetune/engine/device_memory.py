"""How many bytes of a device's memory are free, and how many this process takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

NO_LIMIT = 1 << 62
# Bytes of address space that the libraries take while they compute: their threads' stacks and buffers. Where these
# fail, the libraries end the process without a word.
LIBRARY_SPACE = 1 << 30
# Of each version of control groups: the files with the limit and with what is used, and what of that the system can
# take back (a key of memory.stat).
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Limit(NamedTuple):
    """A limit that this process can't get past, and the bytes that are left below it.

    Attributes:
        shared: whether all processes of a run take from these bytes.
    """

    name: str
    left: int
    shared: bool


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could still take on `device`. On a CPU its limits count, too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    import psutil

    return max(0, min([psutil.virtual_memory().available, *(limit.left for limit in limits())]))


def used_bytes(device: torch.device) -> int:
    """Bytes that this process takes on `device`: on CUDA the peak so far, elsewhere what it takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    import psutil

    return int(psutil.Process().memory_info().rss)


def limits() -> list[Limit]:
    """The limits that are set on this process's memory: the container's or service's, and the shell's."""
    in_groups = min(map(_left_in_group, _groups()), default=NO_LIMIT)
    found = [
        Limit("the container's memory limit (control group)", in_groups, True),
        Limit("the limit of this process's address space (ulimit -v)", _left_in_address_space(), False),
    ]
    return [limit for limit in found if limit.left < NO_LIMIT // 2]  # version 1 has a huge number for no limit


def _left_in_address_space() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return NO_LIMIT
    import psutil

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return NO_LIMIT if limit == resource.RLIM_INFINITY else limit - psutil.Process().memory_info().vms - LIBRARY_SPACE


def _groups(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """The folders of the control groups that count this process's memory, and of the groups around them.

    Args:
        mount: where control groups are mounted; those of version 1 have a folder for memory there.
        own: the file that names the groups of this process. In a container the names may be those of its host.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, name = line.split(":", 2)
        top = mount / "memory" if "memory" in controllers.split(",") else mount if number == "0" else None
        if top is None:
            continue
        group = top / name.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _left_in_group(group: Path) -> int:
    """Bytes left below the memory limit of a control group. A huge number if it has no limit.

    Args:
        group: the group's folder.
    """
    for limit, used, cached in GROUP_FILES:
        try:
            most, taken = int((group / limit).read_text()), int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return most - taken + int(stat.get(cached, 0))
        except (OSError, ValueError):
            continue
    return NO_LIMIT
