"""A cache of prepared sets on disk.

An entry is a folder. Its name is a key, computed from the data, the settings and the code that the entry is made with.
The entry is written beside its place and then renamed, under a lock. It holds the SHA-256 of its files, so a damaged
entry is noticed and made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from phinetune.errors import DataError
from phinetune.files import disk_trouble, staged_folder
from phinetune.home import cache_folder
from phinetune.manifest import damage, has_manifest, write_manifest

logger = logging.getLogger(__name__)

# The folders and files of this package, and the libraries, whose code decides what a row's token ids are.
CODE = (
    *("data/read", "data/prepare", "chats", "checkpoints", "training/objectives"),
    *("engine/examples.py", "config/row_forms.py", "config/format_fields.py"),
)
LIBRARIES = ("tokenizers", "transformers", "jinja2")


def cache_key(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The key of an entry, 32 hexadecimal digits.

    Args:
        settings: the source's digest and the settings, as JSON can hold them.
    """
    code = [code_digest(), *(f"{name} {version(name)}" for name in LIBRARIES)]
    tree = {"made by": code, "tokenizer": tokenizer_digest(tokenizer), **settings}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def code_digest() -> str:
    """SHA-256 of the code that rows go through. Unlike a version number, it changes whenever someone edits the code."""
    package = Path(__file__).resolve().parents[2]
    total = hashlib.sha256()
    for name in CODE:
        place = package / name
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides how a tokenizer renders and encodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):  # truncation and padding come from the last call, so they are left out
        core: Any = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    else:
        core = sorted(tokenizer.get_vocab().items())
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    tree = [type(tokenizer).__name__, core, tokenizer.chat_template, names]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def find_cached(key: str) -> Path | None:
    """The folder of an entry that is there and whole."""
    target = cache_folder() / "data" / key
    return target if target.is_dir() and is_whole(target) else None


def cached_folder(key: str, fill: Callable[[Path], None]) -> Path:
    """The folder of an entry. If it is missing or damaged, it is made first.

    Args:
        fill: writes the entry into an empty folder.

    Raises:
        DataError: the disk is full, or `fill` raised it. Then the cache does not change.
    """
    target = cache_folder() / "data" / key
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # another process may make the same entry: wait for it
        if target.is_dir():
            if is_whole(target):
                logger.info("prepared before: %s", target)
                return target
            logger.warning("%s is damaged and is made again", target)
        for remains in target.parent.glob(f".{key}.partial-*"):  # of a process that was killed
            shutil.rmtree(remains, ignore_errors=True)
        try:
            with staged_folder(target, private=True) as stage:
                fill(stage)
                write_manifest(stage)
        except OSError as error:
            trouble = disk_trouble(error)
            if trouble is None:
                raise
            raise DataError(
                f"{trouble} for prepared data in {target.parent}; delete older entries there, set "
                "PHINETUNE_HOME to a folder with more room, or set data.streaming: true"
            ) from error
        logger.info("kept in %s for later runs (it may be deleted)", target)
    return target


def is_whole(folder: Path) -> bool:
    """Whether an entry has a manifest, and all that it names."""
    try:
        return has_manifest(folder) and not damage(folder)
    except OSError:
        return False
