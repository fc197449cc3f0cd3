"""A reference that is cut off is gone on from where it was, to the bit, and what was kept for that is deleted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import TINY
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.load import load_base
from phinetune.config.data import DataSection
from phinetune.config.model import ModelSection
from phinetune.config.objective import ObjectiveSection
from phinetune.data.read.row import Row
from phinetune.engine.packing import PackedCollator
from phinetune.training import reference, reference_parts
from phinetune.training.objectives.registry import make_objective
from phinetune.training.reference_parts import Parts

ROWS = 12
OnDone = Callable[[int, int], None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(reference, "TOKENS", 100)  # so that a packed row holds a pair or two


def numbers(on_done: OnDone = lambda done, total: None, made_for: str = "these rows") -> np.ndarray[Any, Any]:
    """The reference of some pairs, shape (rows, 2)."""
    objective, loaded = make_objective(ObjectiveSection(kind="dpo")), load_base(ModelSection(path=TINY))
    pairs = [{"prompt": f"How many is {i}?", "chosen": f"It is {i}.", "rejected": "No" * (1 + i)} for i in range(ROWS)]
    encode = objective.row_encoder(DataSection(), make_encoder(loaded.tokenizer), 1024)
    rows = [
        row.encoded.to_row() for row in encode(Row(f"rows:{i}", pair) for i, pair in enumerate(pairs)) if row.encoded
    ]
    data = objective.arranged(rows, ROWS, 1024)
    collate = PackedCollator(share=True, rope_limit=None, owned=True, columns=objective.columns)
    decides = {"rows": made_for}
    made = reference.with_reference(
        loaded.model, data, objective.reference, collate, decides, loaded.tokenizer, on_done
    )
    return made.numbers


class CutOff(BaseException):
    pass


def cut_off_at(most: int) -> OnDone:
    def on_done(done: int, total: int) -> None:
        if done >= most:
            raise CutOff

    return on_done


def kept() -> list[str]:
    """The parts that lie in the cache."""
    return sorted(path.name for path in reference_parts.cache_folder().glob("data/*.part-*"))


def test_a_reference_goes_on_where_it_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = numbers(made_for="others")
    with pytest.raises(CutOff):
        numbers(cut_off_at(ROWS // 2))
    assert len(kept()) == 1
    computed: list[int] = []
    once = reference._numbers

    def counted(model: Any, packed: Any, rows: int) -> torch.Tensor:
        computed.append(rows)
        return once(model, packed, rows)

    monkeypatch.setattr(reference, "_numbers", counted)
    with caplog.at_level(logging.INFO):
        assert np.array_equal(numbers(), whole)
    assert 0 < sum(computed) <= ROWS // 2
    assert f"{ROWS - sum(computed)} of {ROWS} rows were computed before" in caplog.text
    assert kept() == []


def test_a_process_that_is_killed_loses_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't keep anything as it ends; what it kept before is there."""
    monkeypatch.setattr(reference_parts, "EVERY_S", 0.0)
    seen: list[list[str]] = []
    numbers(lambda done, total: seen.append(kept()))
    assert all(len(names) == 1 for names in seen)
    assert kept() == []


def test_parts_of_other_rows_and_damaged_ones_are_not_taken() -> None:
    whole = numbers(made_for="others")
    with pytest.raises(CutOff):
        numbers(cut_off_at(ROWS // 2), made_for="third rows")
    with pytest.raises(CutOff):
        numbers(cut_off_at(ROWS // 2))
    third, own = kept()
    for name in (third, own):
        file = reference_parts.cache_folder() / "data" / name / reference_parts.FILE
        file.write_bytes(file.read_bytes()[:-8])
    assert np.array_equal(numbers(), whole)
    assert len(kept()) == 1  # that of the third rows


def test_parts_of_several_processes_come_together() -> None:
    first, second = Parts("key", 4, 2), Parts("key", 4, 2)
    second._own = second._own.with_name("key.part-1")
    first.found[:2], second.found[2:3] = 1.0, 2.0
    first.keep(now=True)
    second.keep(now=True)
    both = Parts("key", 4, 2)
    assert both.knows([0, 1, 2])
    assert not both.knows([2, 3])
    both.drop()
    assert kept() == []


def test_parts_that_cannot_be_kept_end_no_run(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts("key", 4, 2)
    place = reference_parts.cache_folder() / "data"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file where the folder should be")
    parts.keep(now=True)
    assert "are not kept" in caplog.text
