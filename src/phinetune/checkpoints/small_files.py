"""Reads the JSON files of a checkpoint, and says what a damaged file is instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phinetune.errors import ModelError, reason_of, told_as

LFS_POINTER = b"version https://git-lfs"
LARGEST = 64 << 20  # bytes; the largest tokenizer.json that is known has half of it
WEB_PAGE = (b"<!doctype", b"<html")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint or an adapter.

    Raises:
        ModelError: there is no such file, or it holds something else, or it is too large.
    """
    if file.exists() and not file.is_file():  # a pipe would be waited for, and a device has no end
        raise ModelError(f"{file}: {what_to_do(file)}")
    if file.is_file() and file.stat().st_size > LARGEST:
        raise ModelError(f"{file}: {file.stat().st_size:,} bytes; at most {LARGEST:,} are read; {what_to_do(file)}")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent}: no {file.name} there; is this a model's folder?") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{file}: broken JSON ({reason_of(error)}); {what_to_do(file)}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(tree).__name__}; {what_to_do(file)}")
    return tree


def what_to_do(file: Path) -> str:
    """What to do about a file that can't be read, as the end of a sentence; with what it is instead, if that shows."""
    if not file.is_file():
        return "it is not a file; put the model's own file there"
    with told_as(ModelError, str(file)), file.open("rb") as stream:
        start = stream.read(64).lstrip()
    if start.startswith(LFS_POINTER):
        return "it is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
    if start.lower().startswith(WEB_PAGE):
        return "it is a web page, not the file itself; fetch it again"
    if not start:
        return "it is empty; fetch or write it again"
    return "fetch or write it again"
