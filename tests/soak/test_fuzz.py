"""Every input that fuzzing began with or found is read or refused in a sentence, in little time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak.fuzz_targets import TARGETS, problem_of, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_every_kept_input_is_read_or_refused_in_a_sentence(target: str, tmp_path: Path) -> None:
    found = {file.name: problem_of(target, file.read_bytes(), tmp_path) for file in seeds(target)}
    assert {name: problem for name, problem in found.items() if problem} == {}
    assert len(found) >= 2


def test_a_finding_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(given: bytes, folder: Path) -> None:
        if given == b"memory":
            bytearray(700 << 20)[:: 1 << 12] = b"1" * ((700 << 20) >> 12)
        else:
            raise KeyError("what the reader forgot")

    monkeypatch.setitem(TARGETS, "config", slow)
    assert "KeyError" in (problem_of("config", b"error", tmp_path) or "")
