"""How the program shares the processor: what it sets before torch is loaded, and what it says of others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from phinetune.cpu_share import SPINS, Company, Usage, share_processor


def test_waiting_is_short_unless_the_user_chose() -> None:
    environment: dict[str, str] = {}
    share_processor(environment, torch_is_loaded=False)
    assert environment == {"GOMP_SPINCOUNT": str(SPINS)}


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": ""}])
def test_what_the_user_set_stays(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    share_processor(environment, torch_is_loaded=False)
    assert environment == chosen


def test_nothing_is_set_when_torch_has_read_it_already() -> None:
    environment: dict[str, str] = {}
    share_processor(environment, torch_is_loaded=True)
    assert not environment


@pytest.mark.parametrize(("order", "expected"), [("phinetune, torch", str(SPINS)), ("torch, phinetune", "None")])
def test_importing_phinetune_sets_it_before_torch(order: str, expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = f"import {order}, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_others_are_what_the_machine_used_beyond_this_program() -> None:
    before, after = Usage(10.0, 100.0, 5.0), Usage(14.0, 107.0, 8.0)
    assert before.others_until(after) == 1.0  # 7 seconds of all programs, 3 of this one, in 4 seconds
    assert before.others_until(before) == 0.0
    assert before.others_until(Usage(14.0, 101.0, 8.0)) == 0.0  # clocks tick unlike each other: never negative


def test_own_work_is_not_that_of_others() -> None:
    before = Usage.now()
    while Usage.now().own - before.own < 0.3:
        pass
    after = Usage.now()
    assert after.own - before.own >= 0.3
    assert after.machine - before.machine >= 0.25  # the kernel counts both in ticks of 10 ms


@pytest.mark.parametrize(
    ("used", "cores", "threads", "disturbs"),
    [(0.3, 2, 2, False), (0.5, 2, 2, True), (2.0, 2, 2, True), (3.9, 8, 4, False), (4.6, 8, 4, True)],
)
def test_others_disturb_once_cores_are_missing(used: float, cores: int, threads: int, disturbs: bool) -> None:
    assert Company(used, cores, threads).disturbs is disturbs


def test_a_sentence_says_how_many_cores() -> None:
    assert Company(1.94, 2, 2).describe() == "other programs use 1.9 of 2 cores"
