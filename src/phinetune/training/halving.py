"""Successive halving (Jamieson and Talwalkar 2016): all candidates train a little, the better ones go on.

Pure functions of what is known, so several processes that look at the same numbers come to the same result, in
whatever order the numbers came. optuna's own pruner of that name never lets a candidate wait for others: the first one
always trains to its end, which alone costs as much as the run itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LAST = 1 / 14  # of the steps: after so many one candidate is left
APART = 2.5  # times the steps from one rung to the next
LEAST_STEPS = 2  # B is zero before the first step, so after one step hardly anything is learnt


@dataclass(frozen=True)
class Rung:
    """A look at the candidates: after so many steps of each, so many of them go on."""

    steps: int
    keep: int


def ladder(candidates: int, steps: int) -> list[Rung]:
    """The looks at a number of candidates of so many steps each, until one is left. One candidate needs none.

    Each look keeps the better half. Three candidates lose one after 1/35 of the steps and one after 1/14, so together
    the losers take a tenth of a run.
    """
    keeps = []
    while candidates > 1:
        candidates = math.ceil(candidates / 2)
        keeps.append(candidates)
    found: list[Rung] = []
    for place, keep in enumerate(keeps):
        at = max(LEAST_STEPS, round(steps * LAST / APART ** (len(keeps) - 1 - place)))
        at = min(at, steps)
        if found and found[-1].steps == at:
            found.pop()  # too few steps to look twice
        found.append(Rung(at, keep))
    return found


def at_the_end(steps: int) -> list[Rung]:
    """One look, at the last step: for candidates that part of a run tells nothing about."""
    return [Rung(steps, 1)]


def losers_steps(candidates: int, rungs: Sequence[Rung]) -> int:
    """The steps of all candidates that do not win, together."""
    total, left = 0, candidates
    for rung in rungs:
        total, left = total + (left - rung.keep) * rung.steps, rung.keep
    return total


def looks(candidates: int, rungs: Sequence[Rung]) -> int:
    """How often a candidate is scored, over all of them."""
    return sum([candidates, *(rung.keep for rung in rungs[:-1])]) if rungs else 0


@dataclass
class Decision:
    """What is certain by now.

    Attributes:
        dropped: the candidates that can't win any more, each with the number of the rung where it fell.
        ready: candidates that may train now, each with the rung that it trains up to.
        winner: the last one left; None as long as it is not certain.
    """

    dropped: dict[int, int] = field(default_factory=dict)
    ready: dict[int, int] = field(default_factory=dict)
    winner: int | None = None


def decide(total: int, rungs: Sequence[Rung], scores: Mapping[int, Mapping[int, float]]) -> Decision:
    """Who is out, who may go on.

    A candidate goes on if it stays among the better ones whatever the others will score; it is dropped if enough others
    are better. The lower number wins a tie.

    Args:
        total: how many candidates there will be.
        scores: of each candidate that has begun, its losses by steps; nan counts as the largest.
    """
    found, alive, expected = Decision(), sorted(scores), total
    for place, rung in enumerate(rungs):
        scored = sorted((_loss(scores[one][rung.steps]), one) for one in alive if rung.steps in scores[one])
        found.ready |= {one: place for one in alive if rung.steps not in scores[one]}
        unknown = expected - len(scored)
        found.dropped |= {one: place for _, one in scored[rung.keep :]}
        alive = [one for order, (_, one) in enumerate(scored[: rung.keep]) if order + unknown < rung.keep]
        expected = rung.keep
    if len(alive) == 1 and len(scores) == total:
        found.winner = alive[0]
    return found


def _loss(value: float) -> float:
    return math.inf if math.isnan(value) else value
