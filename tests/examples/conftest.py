"""Every example runs in a copy of examples/, so that nothing is left beside the originals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from examples.example_helpers import EXAMPLES


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A copy of examples/ without what earlier runs left."""
    return shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("runs", ".*"))
