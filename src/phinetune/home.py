"""Where phinetune keeps what it makes for all runs: models, prepared data, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The folder for what phinetune makes: `PHINETUNE_HOME`, else one in the user's cache."""
    return Path(os.environ.get("PHINETUNE_HOME") or platformdirs.user_cache_dir("phinetune"))
