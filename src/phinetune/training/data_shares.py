"""The runs of a data curve: one recipe on growing shares of the rows, each share a part of the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError, DataError
from phinetune.training.prepare import PreparedRun

SHARES = {"1-of-8": 1 / 8, "1-of-4": 1 / 4, "1-of-2": 1 / 2, "all": 1.0}
LEAST_ROWS = 4  # of a share
FEWEST_SHARES = 3  # a law of three numbers can't be seen in fewer
COUNTED = ("max_steps", "warmup_steps", "eval_steps", "save_steps")  # in steps, so they shrink with the share
PUSHING = ("push_to_hub", "hub_")  # how the keys begin that say where a run is pushed


@dataclass(frozen=True)
class ShareRun:
    """The run on one share of the rows.

    Attributes:
        name: of its folder.
        share: of the rows that the configuration trains on.
    """

    name: str
    share: float
    config: RunConfig


def check_curve(prepared: PreparedRun) -> None:
    """Make sure that a run can be repeated on shares of its rows, and that there is something to compare them by.

    Raises:
        ConfigError: it can't, and why.
        DataError: the rows are too few.
    """
    problems = []
    if prepared.config.data.streaming:
        problems.append("data.streaming: shares are drawn among all rows, and a stream's are not known; turn it off")
    if prepared.chats.held_out is None:
        problems.append("data.eval: a curve needs held-out chats; name a file, or write `eval: 0.1`")
    if not prepared.objective.likelihood:
        problems.append(
            f"objective: a curve is drawn over nats a token, and the loss of {prepared.objective.kind} is none; draw "
            "it with sft"
        )
    if prepared.settings.race:
        problems.append(
            "learning_rate: race: all runs of a curve have one rate, and each would race for its own; name a rate, "
            "such as the one that `phinetune tune` found"
        )
    if max(1, prepared.args.world_size) > 1:
        problems.append("a curve trains its runs in one process, one after the other; start it without torchrun")
    if problems:
        raise ConfigError(problems)
    rows = prepared.chats.train.report.kept
    if rows * list(SHARES.values())[-FEWEST_SHARES] < LEAST_ROWS:
        least = round(LEAST_ROWS / list(SHARES.values())[-FEWEST_SHARES])
        raise DataError(f"{prepared.chats.train.report.source}: {rows} rows are too few for a curve; it needs {least}")


def share_runs(prepared: PreparedRun) -> list[ShareRun]:
    """The runs of a curve, the smallest first. Shares of very few rows are left out.

    All have the settings of the whole: rate, rank, epochs, batch and length, as given or as the rules chose them for
    all rows. So nothing but the rows differs, and with them the number of steps. What is counted in steps shrinks with
    the share, so all runs warm up as long and are scored as often, and each keeps its best checkpoint or none does.

    Args:
        prepared: the run on all rows.
    """
    rows = prepared.chats.train.report.kept
    whole = {key: value for key, value in prepared.config.training_config.items() if not key.startswith(PUSHING)}
    made = []
    for name, share in SHARES.items():
        if share * rows < LEAST_ROWS:
            continue
        config = prepared.config.model_copy(deep=True)
        config.data.train_share = share * prepared.config.data.train_share
        config.training_config = _shrunk(whole, share)
        config.evaluation.enabled = False  # the curve scores the held-out rows itself
        made.append(ShareRun(name, share, config))
    return made


def _shrunk(training: dict[str, Any], share: float) -> dict[str, Any]:
    """The settings with what is counted in steps times the share; an interval of checkpoints stays a multiple."""
    made = dict(training)
    for key in COUNTED:
        value = made.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1:  # below, it is a share
            made[key] = max(1, round(value * share))
    save, evaluations = training.get("save_steps"), training.get("eval_steps")
    if isinstance(save, int) and isinstance(evaluations, int) and evaluations >= 1 and save % evaluations == 0:
        made["save_steps"] = made["eval_steps"] * (save // evaluations)
    return made


def told_recipe(prepared: PreparedRun) -> list[str]:
    """What is done with the settings, in sentences: what all runs share, what shrinks, and what is not used."""
    training = prepared.config.training_config
    shrinks = [key for key in COUNTED if isinstance(training.get(key), (int, float)) and training[key] >= 1]
    given = prepared.args
    lines = [
        f"All runs have the settings of the whole: rate {given.learning_rate:g}, rank {prepared.settings.peft['r']}, "
        f"{given.per_device_train_batch_size * given.gradient_accumulation_steps} rows a step, "
        + (f"{given.num_train_epochs:g} epochs" if given.max_steps < 1 else f"{given.max_steps} steps for all rows")
        + "; nothing but the rows differs, and with them the number of steps."
    ]
    if shrinks:
        lines.append(f"Counted in steps, so smaller for smaller shares: {', '.join(shrinks)}.")
    judges = [judge.name for judge in prepared.config.evaluation.judges]
    if judges:
        lines.append(f"Not asked, since a curve compares losses alone: {', '.join(judges)}.")
    unused = [key for key in training if key.startswith(PUSHING)]
    if unused:
        lines.append(f"Not used, since the runs of a curve are not pushed: {', '.join(unused)}.")
    return lines
