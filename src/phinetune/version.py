"""Which version this is, where every layer may ask."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

VERSION = "0.1.0"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


def library_versions() -> dict[str, str]:
    """The libraries below phinetune that are installed, and their versions; none is imported."""
    found = {name: _version(name) for name in LIBRARIES}
    return {name: installed for name, installed in found.items() if installed}


def versions() -> str:
    """A line for a report of a fault: phinetune, Python, system, libraries."""
    libraries = ", ".join(f"{name} {installed}" for name, installed in library_versions().items())
    return f"phinetune {VERSION} (Python {platform.python_version()}, {platform.platform()}; {libraries})"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
