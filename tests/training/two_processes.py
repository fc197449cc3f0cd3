"""Trains the tiny model as a launcher's processes do: `torchrun two_processes.py CHATS FOLDER '{"training": …}'`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from helpers import tiny_config
from phinetune.api.train import train_config
from phinetune.config.objective import ObjectiveSection
from phinetune.screen.console import stdout

if __name__ == "__main__":
    torch.set_num_threads(1)
    chats, folder, changes = sys.argv[1:]
    given = json.loads(changes)
    config = tiny_config(Path(chats), Path(folder), **given.pop("training"))
    config.model.device = "cpu"
    config.model.dtype = "float32"
    config.engine.kind = given.pop("engine", "fast")
    config.objective = ObjectiveSection(**given.pop("objective", {}))
    made = train_config(config, stdout())
    (Path(folder).parent / f"results-{torch.distributed.get_rank()}.json").write_text(json.dumps(made.results))
