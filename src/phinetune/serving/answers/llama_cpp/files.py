"""The GGUF files of a server's models: each is exported once, and found again by what it was made of."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import Checkpoint, short_name
from phinetune.exporting.gguf.model import write_gguf
from phinetune.exporting.gguf.split_form import head_size, window
from phinetune.exporting.longrope import trained_context
from phinetune.exporting.output_paths import staged_file
from phinetune.serving.catalogue import ServedModel

logger = logging.getLogger(__name__)

FOLDER = "gguf"  # in a server's folder
# What a base may be offered with that its file would not have.
LEFT_OUT = {"tokenizer": None, "quantization": "none", "revision": None, "adapter": None, "seed": 0}
BLOCK = 256  # llama.cpp rounds a context up to a multiple of this
CACHE_TYPE_BYTES = 2  # llama.cpp holds keys and values in float16


def place_of(model: ServedModel) -> str:
    """What to export for a model: its run, or its base.

    Raises:
        ModelError: the base is offered with a setting that a GGUF file would not have.
    """
    others = [key for key, value in LEFT_OUT.items() if getattr(model.base, key) != value]
    if others:
        names = ", ".join(f"`{key}`" for key in others)
        raise ModelError(f"{model.base.path}: --backend llama.cpp serves a base as it is, without {names}")
    return str(model.adapter or model.base.path)


def gguf_file(folder: Path, path: str, source: Checkpoint, kind: str) -> Path:
    """The GGUF file of a model; it is written if it is not there.

    Args:
        folder: the server's.
        path: what `source` was opened from.
        kind: the type of its numbers.

    Raises:
        ModelError: the file can't hold this model.
    """
    weights = Path(path) / "adapter_model.safetensors"
    made_of = [source.base.fingerprint, path, kind]
    if weights.is_file():
        found = weights.stat()
        made_of += [str(found.st_size), str(found.st_mtime_ns)]
    file = _folder_of(folder, path) / f"{_digest(made_of)}-{kind}.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        logger.info("writing %s as GGUF, %s: %s", path, kind, file)
        with staged_file(file, overwrite=False) as staged:
            made = write_gguf(source, staged, kind, short_name(path))
        for note in made.notes:
            logger.warning("%s: %s", path, note)
        for old in set(file.parent.glob(f"*-{kind}.gguf")) - {file}:  # of what the model was before
            _drop(old)
    return file


def drop_files(folder: Path, path: str) -> None:
    """Delete the GGUF files of a model that is offered no longer; they are made from its run, which stays.

    Args:
        folder, path: as of `gguf_file`.
    """
    _drop(_folder_of(folder, path))


def keep_files(folder: Path, paths: Iterable[str]) -> None:
    """Delete the GGUF files of all other models than those made from `paths`."""
    kept = {_folder_of(folder, path) for path in paths}
    for found in (folder / FOLDER).iterdir() if (folder / FOLDER).is_dir() else ():
        if found not in kept:
            _drop(found)


def _folder_of(folder: Path, path: str) -> Path:
    return folder / FOLDER / _digest([path])


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _drop(place: Path) -> None:
    """Delete a folder, or a file that an earlier version left. Windows keeps a file that llama.cpp reads."""
    try:
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    except FileNotFoundError:  # it was never written
        return
    except OSError as error:
        logger.warning("%s stays: %s", place, error)
    else:
        logger.info("deleted %s: no model on offer is made so", place)


def context_of(source: Checkpoint, slots: int, most_bytes: int) -> int:
    """The context of each of some conversations, in tokens, by the model's positions and by memory.

    Positions end where LongRoPE's short factors do: llama.cpp chooses the factors by the size of its context.
    """
    config = source.config
    positions = min(trained_context(config), window(config) or trained_context(config))
    heads = config.num_key_value_heads or config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * head_size(config) * CACHE_TYPE_BYTES
    tokens = min(positions, most_bytes // (slots * token))
    return tokens - tokens % BLOCK if tokens > BLOCK else tokens
