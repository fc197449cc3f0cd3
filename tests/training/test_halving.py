"""Halving: who goes on is certain from the numbers alone, in whatever order they come."""

from __future__ import annotations

import itertools
import math

import pytest

from phinetune.training.halving import Rung, at_the_end, decide, ladder, looks, losers_steps


def test_three_candidates_lose_one_early_and_one_later_for_a_tenth_of_a_run() -> None:
    rungs = ladder(3, 700)
    assert rungs == [Rung(20, 2), Rung(50, 1)]
    assert losers_steps(3, rungs) == 70
    assert looks(3, rungs) == 5


def test_a_ladder_halves_until_one_is_left_and_looks_twice_at_no_step() -> None:
    assert [rung.keep for rung in ladder(9, 10_000)] == [5, 3, 2, 1]
    assert ladder(3, 12) == [Rung(2, 1)]
    assert ladder(3, 1) == [Rung(1, 1)]
    assert ladder(1, 700) == []
    steps = [rung.steps for rung in ladder(9, 300)]
    assert steps == sorted(set(steps))


def play(order: tuple[int, ...], losses: list[float], rungs: list[Rung]) -> tuple[list[int], int | None, int]:
    """Let candidates run in an order of preference, a stretch at a time: who was dropped, the winner, all stretches."""
    scores: dict[int, dict[int, float]] = {}
    stretches = 0
    while True:
        found = decide(len(losses), rungs, scores)
        if found.winner is not None:
            return sorted(found.dropped), found.winner, stretches
        waiting = [one for one in order if one not in scores]
        ready = [one for one in order if one in found.ready]
        if ready and (len(waiting) % 2 or not waiting):
            scores[ready[0]][rungs[found.ready[ready[0]]].steps] = losses[ready[0]]
            stretches += 1
        else:
            scores[waiting[0]] = {}


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, math.nan, math.inf, 2.0]])
def test_the_winner_and_the_work_are_the_same_in_every_order(losses: list[float]) -> None:
    rungs = ladder(5, 7000)
    played = {str(play(order, losses, rungs)) for order in itertools.permutations(range(5))}
    best = min(range(5), key=lambda one: math.inf if math.isnan(losses[one]) else losses[one])
    assert played == {str(([one for one in range(5) if one != best], best, looks(5, rungs)))}


def test_nobody_goes_on_who_might_still_fall() -> None:
    rungs = [Rung(2, 2), Rung(5, 1)]
    assert decide(3, rungs, {0: {2: 1.0}}).ready == {}, "both others may be better"
    assert decide(3, rungs, {0: {2: 1.0}, 1: {2: 2.0}}).ready == {0: 1}, "the third may be better than the second"
    assert decide(3, rungs, {0: {2: 1.0}, 1: {2: 2.0}, 2: {2: 1.5}}).dropped == {1: 0}
    assert decide(3, rungs, {0: {2: 1.0, 5: 0.5}, 1: {2: 2.0}, 2: {2: 1.5}}).winner is None


def test_at_the_end_all_are_compared_once() -> None:
    assert decide(2, at_the_end(9), {0: {9: 2.0}, 7: {9: 1.0}}).winner == 7
