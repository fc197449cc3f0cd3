"""Gives the files and folders of a configuration their absolute paths, so that they are found from every folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from phinetune.config.data import OtherSplit, WeightedFile
from phinetune.config.own_metrics import name_places
from phinetune.config.run import RunConfig

RANDOM = "random:"  # `model.path` takes random shapes and the starter besides folders and hub ids


def with_absolute_places(config: RunConfig) -> RunConfig:
    """A copy of a configuration in which each file and folder that exists stands with its absolute path.

    What is not there stays as it is: a hub id, or a file that is missing.
    """
    made = config.model_copy(deep=True)
    if made.model.path != "starter" and not made.model.path.startswith(RANDOM):
        made.model.path = absolute_place(made.model.path)
    made.model.adapter = _absolute(made.model.adapter)
    made.model.tokenizer = _absolute(made.model.tokenizer)
    made.data.train = _absolute(made.data.train)
    made.data.eval = _absolute(made.data.eval)
    made.data.test = _absolute(made.data.test)
    for metric in made.evaluation.own:
        name_places(metric, absolute_place)
    for judge in made.evaluation.judges:
        judge.key_file = _absolute(judge.key_file)
    return made


def _absolute(value: Any) -> Any:
    """The value of a key that names files: a path, a list of paths, or a section with a path."""
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    if isinstance(value, WeightedFile | OtherSplit):
        return value.model_copy(update={"path": _absolute(value.path)})
    return absolute_place(value) if isinstance(value, str) else value


def absolute_place(place: str) -> str:
    """The absolute path of a file or folder that exists, or of a pattern that a file fits; anything else as it is."""
    path = Path(place).expanduser()
    if any(sign in place for sign in "*?[") and not path.exists() and glob.glob(str(path), recursive=True):
        return os.path.abspath(path)
    return str(path.resolve()) if place and path.exists() else place
