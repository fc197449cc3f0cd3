"""Choices made by timing, kept in phinetune's cache folder.

Two ways to compute the same round differently. A run that goes on, in another process and beside other work, has to
compute as it did when it began; so a machine chooses once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from phinetune.engine.kernels.native.build import capability, processor
from phinetune.files import write_text
from phinetune.home import cache_folder

Choice = TypeVar("Choice")


def kept_choice(name: str, choices: Mapping[str, Choice], choose: Callable[[], str]) -> Choice:
    """The choice that this machine made before under this name, else the one that `choose` makes now.

    Of processes that choose at the same time, the first to write decides for all. Where nothing can be written, the
    choice holds for this process.

    Args:
        name: what is chosen, with all that the choice depends on besides processor, torch and threads.
        choices: what there is to choose from, by a name for each.
        choose: gives the name of one of them.
    """
    file = _file()
    made = _read(file).get(name, "")
    if made not in choices:
        made = choose()
        before = {key: value for key, value in _read(file).items() if key != name or value in choices}
        with contextlib.suppress(OSError):
            write_text(file, json.dumps({name: made, **before}, indent=1))
        made = _read(file).get(name, made)
    return choices[made]


def _file() -> Path:
    facts = (torch.__version__, capability(), processor(), str(torch.get_num_threads()))
    return cache_folder() / "choices" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
