"""Who runs in a race, how far, on which held-out rows it is decided, and what that costs; known before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from phinetune.errors import ConfigError
from phinetune.training import halving
from phinetune.training.auto_settings import AUTO_PEFT, FORWARD_SHARE, two_digits
from phinetune.training.candidate import candidate
from phinetune.training.halving import Rung
from phinetune.training.prepare import NO_HELD_OUT, PreparedRun, with_chosen
from phinetune.training.recorded import Record
from phinetune.training.scored_rows import spread

RATE, RANK, EPOCHS = "learning_rate", "r", "num_train_epochs"
AROUND = (1.0, 0.5, 2.0)  # times the rule's rate: the three candidates of a race
# After so few steps a higher rate leads by a little also where it is worse in the end. So the loss of one above the
# rule's counts as higher by this share.
LEAD = 0.05
WIDE = 8.0  # times above and below it: where further candidates are looked for
SCORING_SHARE = 0.03  # of the time of training, for all looks together
LEAST_ROWS, MOST_ROWS = 8, 128  # held-out rows of a look
# What is chosen by the memory that is free, which the base takes a part of once it is loaded.
BY_MEMORY = ("training_config.per_device_train_batch_size", "training_config.gradient_accumulation_steps")
# What candidates may differ in, and what of a record names places and versions.
DIFFERS = ("training_config.learning_rate", "training_config.num_train_epochs", "peft_config.r")
FOLLOWS = ("peft_config.lora_alpha", "training_config.warmup_steps", "training_config.eval_steps")
LEFT_OUT = ("data.", "model.path", "model.tokenizer", "model.adapter", "versions.", "evaluation.", "engine.")


@dataclass(frozen=True)
class Wish:
    """What a tune is asked for.

    Attributes:
        trials: how many rates; those beyond `rates` are looked for by optuna.
        rates: the first of them; empty: the rule's, half of it and twice it.
        ranks, epochs: further values to try, with the best rate; empty: none.
    """

    trials: int | None = None
    rates: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()
    epochs: tuple[float, ...] = ()

    def check(self) -> None:
        """Raises ConfigError: a number that can't be."""
        problems = []
        if self.trials is not None and self.trials < 1:
            problems.append(f"--trials {self.trials}: give 1 or more")
        if self.trials is not None and self.trials < len(self.rates):
            problems.append(f"--trials {self.trials}: --rates names {len(self.rates)}; leave --trials out")
        for name, given in (("rates", self.rates), ("ranks", self.ranks), ("epochs", self.epochs)):
            problems += [f"--{name}: {one}: must be above 0" for one in given if not (one > 0 and math.isfinite(one))]
            if len(set(given)) < len(given):
                problems.append(f"--{name}: a value stands there twice")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Stage:
    """Candidates that differ in one key.

    Attributes:
        key: of the two dictionaries.
        options: the values that are known beforehand.
        first, end: the numbers of the candidates that begin in this stage are first to end - 1.
        total: how many run, the winner of the stage before among them.
        to_the_end: whether they are compared at their last steps, each at its own.
    """

    key: str
    options: Sequence[Any]
    first: int
    end: int
    total: int
    rungs: Sequence[Rung]
    to_the_end: bool = False


@dataclass(frozen=True)
class Part:
    """The held-out rows that decide.

    Attributes:
        rows: how many of them; `of`: of how many.
        places: their places; None is all.
    """

    rows: int
    of: int
    places: list[int] | None


@dataclass(frozen=True)
class Cost:
    """What a race takes beside the one run, as shares of its time of training."""

    losers: float
    scoring: float

    @property
    def share(self) -> float:
        return self.losers + self.scoring


@dataclass
class Entry:
    """All that is settled before a race begins.

    Attributes:
        rows: the run with its rows, nothing chosen.
        first: the run as it would be without a race.
        stages: rates, then ranks, then epochs.
        part: the held-out rows that decide.
    """

    rows: PreparedRun
    first: PreparedRun
    wish: Wish
    stages: list[Stage] = field(default_factory=list)

    @classmethod
    def of(cls, rows: PreparedRun, wish: Wish) -> Entry:
        """Settle a race.

        Raises:
            ConfigError: it can't be held.
        """
        wish.check()
        entry = cls(rows, with_chosen(rows), wish)
        entry._check()
        entry._settle()
        return entry

    def _check(self) -> None:
        problems = []
        if self.rows.chats.held_out is None:
            problems.append(NO_HELD_OUT)
        if float(self.own(RATE)) <= 0:
            problems.append(
                "training_config.learning_rate: give one above 0, or leave it out: rates are tried around it"
            )
        if self.wish.epochs and int(self.first.settings.training.get("max_steps") or -1) > 0:
            problems.append("--epochs: training_config.max_steps says how many steps there are; leave one of them out")
        if self.wish.ranks and self.rows.config.model.adapter:
            problems.append("--ranks: the run goes on from an adapter, which has its rank")
        if problems:
            raise ConfigError(problems)

    def _settle(self) -> None:
        steps, number = self.first.steps.count, self.candidates
        self.stages = [Stage(RATE, self.listed_rates, 0, number, number, halving.ladder(number, steps))]
        looks = {rung.steps for rung in self.stages[0].rungs}
        self._add(RANK, self.wish.ranks, lambda total: _at(halving.ladder(total, steps), looks))
        longest = max(map(self._steps_of, self.wish.epochs), default=0)
        self._add(EPOCHS, self.wish.epochs, lambda total: halving.at_the_end(max(longest, steps)), to_the_end=True)

    def _add(self, key: str, options: Sequence[Any], rungs: Any, to_the_end: bool = False) -> None:
        others = [one for one in options if one != self.own(key)]
        if others:
            first = self.stages[-1].end
            total = len(others) + 1
            self.stages.append(Stage(key, others, first, first + len(others), total, rungs(total), to_the_end))

    def _steps_of(self, epochs: float) -> int:
        return candidate(self.rows, {EPOCHS: epochs}, self.rows.config.output_dir, self.machine).steps.count

    @property
    def candidates(self) -> int:
        """How many rates run."""
        return self.wish.trials or len(self.wish.rates) or len(AROUND)

    @cached_property
    def listed_rates(self) -> list[float]:
        """The rates that are known beforehand."""
        own = float(self.own(RATE))
        given = self.wish.rates or tuple(two_digits(own * one) if one != 1 else own for one in AROUND)
        return list(given[: self.candidates])

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Where rates are looked for."""
        own = [float(self.own(RATE)), *self.listed_rates]
        return {RATE: (min(own) / WIDE, max(own) * WIDE)}

    @property
    def options(self) -> dict[str, list[Any]]:
        """All values of the keys that are not looked for."""
        return {stage.key: [self.own(stage.key), *stage.options] for stage in self.stages[1:]}

    def own(self, key: str) -> Any:
        """The value that the run would have without a race."""
        settings = self.first.settings
        return (settings.peft if key in AUTO_PEFT else settings.training).get(key)

    def value_of(self, values: Mapping[str, Any], key: str) -> Any:
        """A candidate's value of a key."""
        return values.get(key, self.own(key))

    def is_held_back(self, values: Mapping[str, Any]) -> bool:
        """Whether a candidate's rate is above the run's own, so that it has to lead by `LEAD`."""
        return float(self.value_of(values, RATE)) > float(self.own(RATE))

    def weighed(self, stage: Stage, values: Mapping[str, Any], scores: Mapping[int, float]) -> dict[int, float]:
        """A candidate's losses by steps, as they count in a stage."""
        more = LEAD if stage.key == RATE and self.is_held_back(values) else 0.0
        return {steps: loss + more * abs(loss) for steps, loss in scores.items()}

    @cached_property
    def machine(self) -> dict[str, Any]:
        """What all candidates have alike, because the memory that is free changes."""
        return {key: value for key, value in self.first.chosen.items() if key in BY_MEMORY}

    @cached_property
    def part(self) -> Part:
        """The rows that decide: so many that all looks together take `SCORING_SHARE`, evenly over the held-out rows."""
        held_out = self.first.chats.held_out
        assert held_out
        of = len(held_out)
        a_row = held_out.report.tokens / max(1, of)
        looks = sum(halving.looks(stage.total, stage.rungs) for stage in self.stages)
        budget = SCORING_SHARE * self.first.steps.tokens / (FORWARD_SHARE * max(1, looks))
        wanted = min(MOST_ROWS, max(LEAST_ROWS, int(budget / max(1.0, a_row))))
        places = spread(of, wanted, self.first.scored_together)
        return Part(of if places is None else len(places), of, places)

    @cached_property
    def cost(self) -> Cost:
        """What the race takes."""
        held_out, steps = self.first.chats.held_out, self.first.steps
        assert held_out
        losers, looks = 0, 0
        for stage in self.stages:
            looks += halving.looks(stage.total, stage.rungs)
            if stage.to_the_end:
                losers += sum(self._steps_of(one) for one in stage.options)
            else:
                losers += halving.losers_steps(stage.total, stage.rungs)
        tokens = self.part.rows * held_out.report.tokens / max(1, self.part.of)
        return Cost(losers / steps.count, looks * tokens * FORWARD_SHARE / max(1, steps.tokens))

    def describe(self) -> list[str]:
        """What will happen and what it costs, before it begins."""
        return [*(self._describe(stage) for stage in self.stages), self._describe_cost()]

    def _describe(self, stage: Stage) -> str:
        own = [] if stage.key == RATE else [self.own(stage.key)]
        named = ", ".join(f"{one:g}" for one in [*own, *stage.options])
        more = stage.end - stage.first - len(stage.options)
        named += f" and {more} that optuna looks for" if more else ""
        if stage.to_the_end:
            return f"Then {stage.key}: {named}; each trains to its end."
        left, parts = stage.total, []
        for rung in stage.rungs:
            on = "the best goes on" if rung.keep == 1 else f"{rung.keep} of them go on"
            parts.append(f"the {left} train to step {rung.steps} and {on}")
            left = rung.keep
        lead = "A race of" if stage.key == RATE else "Then a race of"
        return f"{lead} {stage.key}: {named}; {', '.join(parts) or 'nothing to decide'}."

    def _describe_cost(self) -> str:
        cost, part = self.cost, self.part
        return (
            f"It takes about {cost.share:.0%} more time than the one run of {self.first.steps.count:,} steps: steps of "
            f"those that lose {cost.losers:.0%}, looks at {part.rows} of {part.of} held-out rows {cost.scoring:.0%}."
        )

    def field(self, record: Record) -> dict[str, Any]:
        """What has to be the same for all processes that share a study.

        Args:
            record: of the run without a race.
        """
        differs = (*DIFFERS, *FOLLOWS, *self.machine)  # more memory divides the rows of a step otherwise
        args = self.first.args
        same = {key: value for key, value in record.items() if not key.startswith(LEFT_OUT) and key not in differs}
        return {
            **same,
            "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "stages": [[stage.key, list(stage.options), stage.total] for stage in self.stages],
            "rungs": [[rung.steps for rung in stage.rungs] for stage in self.stages],
            "rows that decide": self.part.places,
        }


def _at(rungs: Sequence[Rung], looks: set[int]) -> list[Rung]:
    """The rungs at which the winner so far has been looked at, so that it need not train again."""
    return [rung for rung in rungs if rung.steps in looks] if looks else list(rungs)
