"""What a run asks of DeepSpeed: `training_config.deepspeed`, a file or a dictionary that transformers follows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KEY = "training_config.deepspeed"
WHOLE = 2  # the last stage that leaves a process the whole base
ENVIRONMENT = "ACCELERATE_USE_DEEPSPEED"  # of `accelerate launch` with a DeepSpeed configuration


def wrong_with_deepspeed(value: Any, environment: Mapping[str, str] | None = None) -> list[str]:
    """Why this wish cannot be followed, a sentence each; none if it can, or if there is no wish.

    Args:
        value: of the key.
        environment: the process's own, if left out.
    """
    environment = os.environ if environment is None else environment
    launched = environment.get(ENVIRONMENT, "").lower() == "true"
    if not value:
        by_file = f"name its JSON file as {KEY}, and start the run with torchrun"
        return [f"`accelerate launch` asks for DeepSpeed; {by_file}"] if launched else []
    if not find_spec("deepspeed"):
        return [f"{KEY}: deepspeed is not installed; pip install deepspeed"]
    try:
        tree = value if isinstance(value, Mapping) else json.loads(Path(value).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        return [f"{KEY}: {value}: {error}"]
    zero = tree.get("zero_optimization") if isinstance(tree, Mapping) else None
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage in range(WHOLE + 1):
        return []
    spread = "training_config.fsdp: true spreads the base over the processes (FSDP2)"
    return [f"{KEY}: zero_optimization.stage: {stage}: stages 0 to {WHOLE} are taken here; {spread}"]
