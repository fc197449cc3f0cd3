"""The disk that a run's checkpoints take."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from trl import SFTConfig

from phinetune.planning.memory import FLOAT32, optimizer_bytes, optimizer_name
from phinetune.planning.sizes import Sizes
from phinetune.planning.steps import Steps


def checkpoint_bytes(args: SFTConfig, sizes: Sizes, steps: Steps) -> int:
    """The adapter and the checkpoints that are kept; one more than save_total_limit, while the newest is written."""
    adapter = FLOAT32 * sizes.trainable
    count = _count(args, steps)
    if args.save_total_limit is not None and count > args.save_total_limit:
        count = args.save_total_limit + 1
    return adapter + count * (adapter + optimizer_bytes(optimizer_name(args)) * sizes.trainable)


def _count(args: SFTConfig, steps: Steps) -> int:
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps.count))
        return -(-steps.count // int(every))  # the last step's is written whatever its number
    return {"epoch": math.ceil(args.num_train_epochs), "best": 1}.get(strategy, 0)


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
