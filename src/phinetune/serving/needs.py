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


def check_installed(*, llama_cpp: bool = False) -> None:
    """Make sure that the libraries of the extra `serve` are there, and llama.cpp if it is to answer.

    Raises:
        RunError: some are not.
    """
    missing = [name for module, name in EXTRA.items() if find_spec(module) is None]
    if missing:
        raise RunError(f"`phinetune serve` needs {', '.join(missing)}; pip install 'phinetune[serve]'")
    if llama_cpp and find_spec("xllamacpp") is None:
        raise RunError("`phinetune serve --backend llama.cpp` needs xllamacpp; pip install 'phinetune[llamacpp]'")
