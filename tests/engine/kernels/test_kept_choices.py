"""A machine chooses once, whatever runs beside it later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phinetune.engine.kernels.kept_choices import kept_choice

WAYS = {"small": 64, "large": 256}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def files(home: Path) -> list[Path]:
    return sorted((home / "choices").iterdir())


def test_a_later_process_takes_what_was_chosen_first() -> None:
    assert kept_choice("segments", WAYS, lambda: "large") == 256
    assert kept_choice("segments", WAYS, lambda: pytest.fail("chosen twice")) == 256
    assert kept_choice("others", WAYS, lambda: "small") == 64
    assert kept_choice("segments", WAYS, lambda: pytest.fail("forgotten")) == 256


def test_of_two_at_once_the_first_to_write_decides() -> None:
    def meanwhile() -> str:
        kept_choice("segments", WAYS, lambda: "small")
        return "large"

    assert kept_choice("segments", WAYS, meanwhile) == 64


def test_what_is_no_choice_any_more_is_made_anew(home: Path) -> None:
    kept_choice("segments", {"huge": 4096}, lambda: "huge")
    assert kept_choice("segments", WAYS, lambda: "small") == 64
    files(home)[0].write_text("[torn")
    assert kept_choice("segments", WAYS, lambda: "large") == 256
    assert kept_choice("segments", WAYS, lambda: pytest.fail("not kept")) == 256


def test_other_threads_choose_for_themselves(home: Path) -> None:
    kept_choice("segments", WAYS, lambda: "small")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert kept_choice("segments", WAYS, lambda: "large") == 256
    finally:
        torch.set_num_threads(threads)
    assert len(files(home)) == 2


def test_a_folder_that_can_not_be_written_costs_nothing_but_time(home: Path) -> None:
    home.write_text("a file")
    assert kept_choice("segments", WAYS, lambda: "large") == 256
