"""The rules for settings that the user leaves to phinetune, each a function of numbers, with the words for its reason.

Sources: "LoRA Without Regret" (Schulman and Thinking Machines, 2025) and the learning rates that the Tinker cookbook
fitted to it. docs/choices.md tells the rules to users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
RACE = "race"  # the learning rate: `auto`, and two around it are tried, too
# The keys that may be `auto`, and are so where they are not given. `eval_strategy` and what keeps the best checkpoint
# follow from `eval_steps` and `save_steps`.
AUTO_PEFT = ("r", "lora_alpha")
AUTO_TRAINING = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_steps", "max_length", "eval_strategy", "eval_steps", "save_strategy", "save_steps"),
)

LENGTH_CAP = 4096  # tokens; longer chats take memory and time that the user should ask for
LEAST_LENGTH = 1024  # TRL's default
ALPHA = 32  # the rate was fitted with it; the update is scaled by alpha / r, so the best rate hardly depends on r
RANKS = (16, 32, 64, 128)
SHORT_RUN = 100  # steps
SHORT_FACTOR = 1.5  # 15 times the rate of full fine-tuning, where longer runs take 10 times it
UNLIKE = 0.2  # share of the pairs of tokens that stand in one row only, from which rows count as unlike each other
UNLIKE_FACTOR = 0.5  # of the rate for such rows, where each is taken `SEVERAL` times or oftener
SEVERAL = 1.5
# How many rows are looked at: fewer share little in any case, and of more each is taken once or twice.
UNLIKE_ROWS = (50, 2_000)
HIGHEST_RATE = 3e-3  # the fit begins at widths of 2,000; far below them it is only extended
STEPS_AN_EPOCH = 40  # so many are wanted before larger steps are
BATCHES = (2, 4, 8, 16)
WARMUP_SHARE, LONGEST_WARMUP, NO_WARMUP_BELOW = 0.05, 100, 40
EVALUATIONS = 10  # at most so many during a run
EVALUATION_SHARE = 0.15  # of the time of training
LOOKS = 4  # evaluations of a run whose held-out chats take too long, each of some of them
LEAST_SCORED = 32  # of them; fewer tell too little
FORWARD_SHARE = 1 / 3  # what scoring a token takes of what training on it takes
CHECKPOINTS = 4  # where nothing is held out
LEAST_INTERVAL = 10  # steps between these; in so few, little is lost
FAR = 5.0  # a given number is far from its rule if it is so many times above or below it


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen, or one that was given and is far from its rule.

    Attributes:
        key: `section.key`, as in the configuration.
        why: the reason in one line; of a given value, what to expect of it.
        given: whether the user gave the value.
    """

    key: str
    value: Any
    why: str
    given: bool = False


def learning_rate(hidden: int, steps: int, by_heart: bool = False) -> float:
    """The peak learning rate of LoRA for a model of this width, in two digits.

    5e-4 · (2000 / hidden)^0.781 is the fit of the Tinker cookbook (`hyperparam_utils.get_lr`) to the best rates of
    models of the Llama kind: 10 times the best rate of full fine-tuning. "LoRA Without Regret" finds 15 times it for
    runs of some hundred steps.

    Args:
        hidden: the model's hidden size.
        steps: of the run.
        by_heart: whether it takes rows several times that have little in common. They want a lower rate
            (`benchmarks.choices`: alpaca).
    """
    rate = 5e-4 * (2000 / hidden) ** 0.781 * (SHORT_FACTOR if steps < SHORT_RUN else 1)
    return two_digits(min(rate, HIGHEST_RATE) * (UNLIKE_FACTOR if by_heart else 1))


def rank(trained: int, a_rank: int, widest: int) -> int:
    """The least of `RANKS` with which LoRA's parameters outnumber the trained tokens; the largest if none does.

    LoRA learns like full fine-tuning as long as what is to be learnt fits into it, and language holds about a bit a
    token ("LoRA Without Regret").

    Args:
        trained: trained tokens of the data, each counted once.
        a_rank: LoRA's parameters for each rank.
        widest: the largest rank that makes sense for the model's layers.
    """
    fitting = [one for one in RANKS if one <= max(widest, RANKS[0])]
    return next((one for one in fitting if one * a_rank > trained), fitting[-1])


def alpha(r: int, rslora: bool) -> int:
    """The alpha for which the update is scaled by `ALPHA` / r, also where rsLoRA divides by √r."""
    return max(1, round(ALPHA / math.sqrt(r))) if rslora else ALPHA


def epochs(rows: int, unlike: bool = False) -> int:
    """How often all rows are taken: small sets oftener. Alpaca's 3 epochs, and 1 for sets of tens of thousands.

    The smallest get 4: with 100 to 400 rows that was better than 3 in four sets of six (`benchmarks.choices`). Rows
    that are unlike each other get 2, at half the rate: later epochs learn them by heart.
    """
    if unlike and rows <= UNLIKE_ROWS[1]:
        return 2
    return 4 if rows <= 500 else 3 if rows <= 2_000 else 2 if rows <= 20_000 else 1


def batch(rows: int) -> int:
    """The rows of a step: as many as leave `STEPS_AN_EPOCH` steps an epoch, and few in any case.

    LoRA loses more by large batches than full fine-tuning does, at every rank ("LoRA Without Regret").
    """
    return max((one for one in BATCHES if rows >= one * STEPS_AN_EPOCH), default=BATCHES[0])


def split_batch(rows: int, longest: int, room: int, processes: int) -> tuple[int, int]:
    """The rows of a micro-batch and the micro-batches of a step, for a step of so many rows.

    Args:
        longest: tokens of the longest row.
        room: tokens that a micro-batch may have on this machine.
        processes: that share each step.
    """
    own = max(1, rows // processes)
    fitting = max(1, min(own, room // max(1, longest)))
    micro = 1 << (fitting.bit_length() - 1)
    return micro, max(1, own // micro)


def warmup(steps: int) -> int:
    """The steps in which the rate rises. B begins at zero, so LoRA warms itself up, and short runs go without."""
    return 0 if steps < NO_WARMUP_BELOW else min(LONGEST_WARMUP, int(WARMUP_SHARE * steps))


def length_cap(positions: int, room: int) -> int:
    """The most tokens that a chat may have before the data is known: a power of two, or the model's positions.

    Args:
        positions: `max_position_embeddings`.
        room: tokens that fit into the machine's memory at a time.
    """
    fitting = 1 << (max(LEAST_LENGTH, room).bit_length() - 1)
    return min(positions, LENGTH_CAP, fitting)


def length(longest: int, cap: int) -> int:
    """The tokens that a chat may have: the longest one's in steps of 64, at least TRL's default, at most the cap."""
    return min(cap, max(LEAST_LENGTH, 64 * math.ceil(longest / 64)))


def evaluation_interval(steps: int, trained: int, held_out: int, wanted: bool) -> int | None:
    """After how many steps the held-out rows are scored; None if two evaluations would take too much of the time.

    Args:
        trained: tokens of all steps together.
        held_out: tokens of the held-out rows.
        wanted: whether the run needs evaluations, whatever they take.
    """
    affordable = int(EVALUATION_SHARE * trained / max(1.0, FORWARD_SHARE * held_out))
    number = min(EVALUATIONS, steps, max(affordable, 3 if wanted else 0))
    return math.ceil(steps / number) if number >= 2 or (wanted and number) else None


def scored_rows(trained: int, held_out: int, rows: int, wanted: bool) -> int | None:
    """How many held-out rows each of `LOOKS` evaluations can score; None if they are too few to tell anything.

    Args:
        trained: tokens of all steps together.
        held_out: tokens of the held-out rows; `rows`: how many there are.
        wanted: whether the run needs evaluations, whatever they take.
    """
    affordable = int(rows * EVALUATION_SHARE * trained / (LOOKS * FORWARD_SHARE * max(1, held_out)))
    if affordable < LEAST_SCORED and not wanted:
        return None
    return min(rows, max(affordable, LEAST_SCORED))


def save_interval(steps: int) -> int:
    """After how many steps a checkpoint is written where nothing is held out."""
    return max(LEAST_INTERVAL, math.ceil(steps / CHECKPOINTS))


def together(save: int, interval: int) -> int:
    """An interval of evaluations that divides a given one of checkpoints, not below `interval` if that can be.

    Only then is each checkpoint one that was scored, so that the best can be kept.
    """
    return next((one for one in range(min(interval, save), save + 1) if save % one == 0), save)


def two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def times(value: float, wanted: float) -> str | None:
    """How far a value is from its rule, as `some 20 times below`; None if it is near."""
    ratio = value / wanted if wanted else 1.0
    if ratio <= 0 or 1 / FAR < ratio < FAR:
        return None
    size = ratio if ratio >= 1 else 1 / ratio
    return f"some {float(f'{size:.1g}'):,.0f} times {'above' if ratio >= 1 else 'below'}"
