"""What a server needs beside phinetune's own libraries."""

from __future__ import annotations

from importlib.util import find_spec

from phinetune.errors import RunError

EXTRA = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "llguidance": "llguidance",
}


def check_installed() -> None:
    """Make sure that the libraries of the extra `serve` are there.

    Raises:
        RunError: some are not.
    """
    missing = [name for module, name in EXTRA.items() if find_spec(module) is None]
    if missing:
        raise RunError(f"`phinetune serve` needs {', '.join(missing)}; pip install 'phinetune[serve]'")
