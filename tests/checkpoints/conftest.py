"""Shared by the tests of checkpoints: the tiny model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune.checkpoints.load import Loaded


@pytest.fixture
def folder(tiny: Loaded, tmp_path: Path) -> Path:
    """The tiny model as a checkpoint on disk."""
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
