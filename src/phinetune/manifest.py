"""The manifest of a folder: names, sizes and SHA-256 of its files, so that damage is noticed and named."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from phinetune.errors import reason_of
from phinetune.files import file_digest, write_text

MANIFEST = "manifest.json"
VERSION = 1


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in a folder, and in the folders in it, into the folder."""
    files = {name: {"size": file.stat().st_size, "sha256": file_digest(file)} for name, file in sorted(_files(folder))}
    write_text(folder / MANIFEST, json.dumps({"version": VERSION, "files": files}, indent=1) + "\n")


def has_manifest(folder: Path) -> bool:
    """Whether there is a manifest. Folders that an older version wrote have none."""
    return (folder / MANIFEST).exists()


def damage(folder: Path) -> list[str]:
    """What is wrong with the files of a folder, a few words for each; empty if it is whole.

    Every file that the manifest names is compared with it. Without a manifest, it is looked whether the files can be
    read as what their names say: an archive's checksums, the places of tensors, JSON.

    Raises:
        OSError: a file can't be read, which says nothing about what is in it.
    """
    there = dict(_files(folder))
    if not has_manifest(folder):
        return [f"{name} {fault}" for name, file in sorted(there.items()) if (fault := _unreadable(file))]
    text = (folder / MANIFEST).read_bytes()
    try:
        named: Mapping[str, Any] = json.loads(text)["files"]
        listed = [(str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in named.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [f"{MANIFEST} is damaged"]
    if not listed:
        return [f"{MANIFEST} names no file"]
    # Names are looked up among the files that are there, so that a stranger's manifest opens nothing else.
    faults = ((name, _unlike(there.get(name), size, digest)) for name, size, digest in listed)
    return [f"{name} {fault}" for name, fault in faults if fault]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in folder.rglob("*"):
        if file.is_file() and file.name != MANIFEST:
            yield file.relative_to(folder).as_posix(), file


def _unlike(file: Path | None, size: int, digest: str) -> str | None:
    """How a file differs from what the manifest says; None if it doesn't."""
    if file is None:
        return "is missing"
    found = file.stat().st_size
    if found != size:
        return f"has {found:,} bytes instead of {size:,}"
    return None if file_digest(file) == digest else f"is damaged (its SHA-256 is not that of {MANIFEST})"


def _unreadable(file: Path) -> str | None:
    """Why a file can't be what its name says; None if it can."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="numpy") as tensors:
                return None if tensors.keys() else "holds no tensor"
        if file.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(file) as archive:
                part = archive.testzip()
            return f"is damaged (in {part})" if part else None
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile, NotImplementedError) as error:
        return f"can't be read ({reason_of(error)})"
    return None
