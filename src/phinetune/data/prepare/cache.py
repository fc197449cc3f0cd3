"""Prepared sets kept on disk, found again by what they were made of and how.

An entry is a folder named by its key. It is written beside its place and renamed, under a lock, and holds the SHA-256
of its files: one that is damaged is made anew.
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

from phinetune.checkpoints.starter import cache_folder
from phinetune.data.read.sources import file_digest
from phinetune.errors import DataError
from phinetune.files import is_disk_full, staged_folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What a row's ids may depend on besides the data and the settings: this package's code that makes them, and libraries.
CODE = ("data", "chat", "checkpoints")
LIBRARIES = ("tokenizers", "transformers", "jinja2")


def key_of(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of what `settings` (values of JSON) and this state of the program make with a tokenizer."""
    made_by = [_code_digest(), *(f"{name} {version(name)}" for name in LIBRARIES)]
    tree = {"made by": made_by, "tokenizer": _fingerprint(tokenizer), **settings}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code_digest() -> str:
    """SHA-256 of the code that rows go through: it says more than a version, and counts in a checkout too."""
    package = Path(__file__).resolve().parents[2]
    total = hashlib.sha256()
    for folder in CODE:
        for file in sorted((package / folder).rglob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides how it renders and encodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):  # how it was last asked to cut and pad does not matter
        core: Any = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    else:
        core = sorted(tokenizer.get_vocab().items())
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    tree = [type(tokenizer).__name__, core, tokenizer.chat_template, names]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def kept(key: str, make: Callable[[Path], None]) -> Path:
    """The folder of an entry, filled by `make` unless it is there and whole.

    Raises:
        DataError: there is no room for it, or `make` finds the data unusable; nothing is kept then.
    """
    target = cache_folder() / "data" / key
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # another process may be at the same work: wait for it, then read
        if target.is_dir():
            if _is_whole(target):
                logger.info("prepared before: %s", target)
                return target
            logger.warning("%s is damaged and is made anew", target)
        for left in target.parent.glob(f".{key}.partial-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            with staged_folder(target) as stage:
                make(stage)
                _write_manifest(stage)
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise DataError(
                f"no space is left for prepared data in {target.parent}; delete older entries there, set "
                "PHINETUNE_HOME to a folder with more room, or set data.streaming: true"
            ) from error
        logger.info("kept in %s (delete it when you like)", target)
    return target


def _write_manifest(folder: Path) -> None:
    digests = {file.name: file_digest(file) for file in sorted(folder.glob("*.arrow"))}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False
