"""A run that can't fit below a limit is refused before its weights are loaded."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import pytest

from helpers import tiny_config
from phinetune.engine.device_memory import LIBRARY_SPACE, NO_LIMIT, Limit
from phinetune.errors import RunError
from phinetune.planning import limits
from phinetune.planning.limits import check_limits
from phinetune.planning.setup import Setup
from phinetune.training.prepare import PreparedRun, prepare_run, settle


@pytest.fixture
def prepared(chats: Path, tmp_path: Path) -> PreparedRun:
    return prepare_run(settle(tiny_config(chats, tmp_path / "run")))


def test_what_is_left_below_each_limit_decides(prepared: PreparedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    need = Setup.of(prepared).need().memory.total
    for lefts, refused in (([], 0), ([need, NO_LIMIT], 0), ([need - 1], 1), ([need - 1, need, -5], 2)):
        found = [Limit(f"limit {place}", left, True) for place, left in enumerate(lefts)]
        monkeypatch.setattr(limits, "limits", lambda found=found: found)
        if not refused:
            check_limits(prepared)
            continue
        with pytest.raises(RunError, match=r"limit 0 leaves .* MB for it; raise that limit, or lower") as caught:
            check_limits(prepared)
        assert len(caught.value.problems) == refused
        assert "phinetune plan" in str(caught.value)
    assert " limit 2 leaves 0 MB" in caught.value.problems[1]


def test_several_processes_take_so_many_times_as_much(prepared: PreparedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    need = Setup.of(prepared).need().memory.total
    for count, shared, fits in ((2, True, True), (3, True, False), (3, False, True)):
        monkeypatch.setattr(limits, "limits", lambda shared=shared: [Limit("the limit", 2 * need, shared)])
        monkeypatch.setattr("phinetune.processes.count", lambda count=count: count)
        if fits:
            check_limits(prepared)
        else:
            with pytest.raises(RunError):
                check_limits(prepared)


def test_a_real_limit_of_the_address_space_refuses_a_run(prepared: PreparedRun) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + LIBRARY_SPACE // 2
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        with pytest.raises(RunError, match=r"address space \(ulimit -v\) leaves 0 MB"):
            check_limits(prepared)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
