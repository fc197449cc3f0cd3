"""How much of the disk a run's checkpoints take, and how much is free."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from trl import SFTConfig

from phinetune.planning.memory import FLOAT32, optimizer_bytes, optimizer_name
from phinetune.planning.sizes import Sizes
from phinetune.training.steps import Steps
from phinetune.training.value_rules import plain_name


def checkpoint_bytes(args: SFTConfig, sizes: Sizes, steps: Steps) -> int:
    """Bytes of the adapter and of all checkpoints that exist at the same time.

    These are one more than save_total_limit while the newest one is written.
    """
    adapter = FLOAT32 * sizes.trainable
    count = _count(args, steps)
    if args.save_total_limit is not None and count > args.save_total_limit:
        count = args.save_total_limit + 1
    return adapter + count * (adapter + optimizer_bytes(optimizer_name(args)) * sizes.trainable)


def _count(args: SFTConfig, steps: Steps) -> int:
    """How many checkpoints the run saves."""
    strategy = plain_name(args.save_strategy)
    if strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps.count))
        return -(-steps.count // int(every))  # rounded up, because the last step always saves one
    return {"epoch": math.ceil(args.num_train_epochs), "best": 1}.get(strategy, 0)


def free_disk(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    existing = folder.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
