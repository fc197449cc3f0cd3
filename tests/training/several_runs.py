"""Trains tiny models, one after the other, as a launcher's processes: `torchrun several_runs.py RUNS.json`.

A run is `{"chats", "folder", "training"}` and, if it needs them, `dtype`, `engine`, `model`, `objective`,
`quantization`, `resume`, `changed`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from helpers import tiny_config
from phinetune import processes
from phinetune.api.train import train_config
from phinetune.config.objective import ObjectiveSection
from phinetune.config.run import RunConfig
from phinetune.screen.console import stdout


def configured(run: dict[str, Any]) -> RunConfig:
    """The configuration of a run."""
    config = tiny_config(Path(run["chats"]), Path(run["folder"]), **run["training"])
    config.model.device, config.model.dtype = "cpu", run.get("dtype", "float32")
    config.model.path = run.get("model", config.model.path)
    config.model.quantization = run.get("quantization", "none")
    config.engine.kind = run.get("engine", "fast")
    config.objective = ObjectiveSection(**run.get("objective", {}))
    return config


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        if processes.is_main():
            print(f"run {run['folder']}", file=sys.stderr)
        options = {key: run.get(key, False) for key in ("resume", "changed")}
        train_config(configured(run), stdout(), **options)
