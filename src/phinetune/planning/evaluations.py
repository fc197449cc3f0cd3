"""What a run's evaluations come to: how often it looks at its held-out chats, and what is compared at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from phinetune.planning.probe import Speed
from phinetune.training.prepare import PreparedRun
from phinetune.training.steps import Steps
from phinetune.training.value_rules import plain_name


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run.

    Attributes:
        count: how many times the held-out chats are scored while the model trains.
        scored: how many of them, and tokens: how many tokens one of these times reads.
        seconds: the time that all of them take; None if it was not measured. Answers are not counted.
        compared: chats that base and tuned model are compared on after training.
        answered: how many of their prompts each of the two answers.
    """

    count: int
    scored: int
    tokens: int
    seconds: float | None
    compared: int
    answered: int


def evaluations_of(prepared: PreparedRun, steps: Steps, speed: Speed | None, layers: int) -> Evaluations:
    """The evaluations of a prepared run.

    Args:
        speed: what was measured; None if nothing was.
        layers: how many layers the model has.
    """
    held_out, measured, section = prepared.chats.held_out, prepared.chats.measured, prepared.config.evaluation
    scored = len(prepared.scored or held_out) if held_out else 0
    tokens = int(prepared.objective.row_tokens(held_out.lengths())[prepared.scored or ...].sum()) if held_out else 0
    count = evaluation_count(prepared.args, steps) if held_out else 0
    compared = len(measured) if measured and section.enabled else 0
    answered = min(compared, section.max_prompts or compared) if section.generate else 0
    seconds = count * speed.reading(layers, tokens) if speed else None
    return Evaluations(count, scored, tokens, seconds, compared, answered)


def evaluation_count(args: TrainingArguments, steps: Steps) -> int:
    """How many times transformers' trainer evaluates."""
    strategy, delay = plain_name(args.eval_strategy), args.eval_delay or 0
    first = int(bool(args.eval_on_start))
    if strategy == "no":
        return first
    if strategy == "epoch":
        batches = math.ceil(steps.rows / (args.per_device_train_batch_size * max(1, args.world_size)))
        ends = math.ceil(steps.count / math.ceil(batches / args.gradient_accumulation_steps))
        return first + sum(epoch >= delay for epoch in range(1, ends + 1))
    every = args.eval_steps or args.logging_steps
    every = math.ceil(every * steps.count) if every < 1 else int(every)
    return first + sum(step >= delay for step in range(every, steps.count + 1, every))
