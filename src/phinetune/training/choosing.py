"""Chooses the settings of a run that the user left open, by the rules of `auto_settings`, once its rows are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from phinetune.config.run import RunConfig
from phinetune.engine.device_memory import free_bytes
from phinetune.engine.families import ModelConfig
from phinetune.training import auto_settings as rules
from phinetune.training.auto_settings import AUTO, AUTO_PEFT, RACE, Choice
from phinetune.training.rehearsal import adapted_shape
from phinetune.training.settings import Settings
from phinetune.training.steps import Steps
from phinetune.training.value_rules import plain_name

# What needs an evaluation during training, whatever it takes, where the user asks for it.
NEEDS_EVALUATIONS = ("metric_for_best_model", "load_best_model_at_end", "eval_on_start")
SCORED = "rows_while_training"  # a key of the section `evaluation`
UNTIL_CHOSEN = 500  # steps; transformers' own interval of checkpoints
FEW_ROWS_FOR_EPOCHS = 2.5  # times the rule's epochs, from which rows are likely to be learnt by heart


@dataclass(frozen=True)
class Ground:
    """What the rules go by, of model, machine and data.

    Attributes:
        hidden: the model's hidden size.
        a_rank: LoRA's parameters for each rank.
        room: tokens that a micro-batch may have on this machine.
        processes: that share each step.
        rate: the objective's rate beside that of supervised fine-tuning.
        least_batch: rows that the objective wants in a micro-batch.
        rows, longest: of what micro-batches are made of; of a stream, `rows` is None.
        trained: trained tokens of the data.
        held_out: tokens of the held-out rows that evaluations score; 0 without any.
        held_out_rows: how many rows they are, if it was left open how many are scored; None if it is given.
        cap: the most tokens that a chat was read with.
        in_one_row: the share of the pairs of trained tokens that stand in one row only; None where nobody looked.
        wants_evaluations: whether the section `evaluation` asks for something at evaluations.
    """

    hidden: int
    a_rank: int
    room: int
    processes: int
    rate: float
    rows: int | None
    longest: int
    trained: int
    held_out: int
    cap: int
    wants_evaluations: bool = False
    least_batch: int = 1
    held_out_rows: int | None = None
    in_one_row: float | None = None

    @property
    def unlike(self) -> bool:
        """Whether the rows have little in common."""
        return self.in_one_row is not None and self.in_one_row >= rules.UNLIKE


def expect_evaluations(settings: Settings, config: RunConfig) -> Settings:
    """The settings before the rows are known: if nothing was said of evaluations and rows are held out, there will be
    some. Until they are chosen, intervals have values that go together.
    """
    training, auto = dict(settings.training), settings.auto
    if "eval_strategy" in auto and config.data.eval is None:
        return replace(settings, auto=auto - {"eval_strategy", "eval_steps"})
    if "eval_strategy" in auto:  # checkpoints that are written once an epoch are scored then
        training["eval_strategy"] = "epoch" if plain_name(training.get("save_strategy")) == "epoch" else "steps"
    if "eval_steps" in auto and plain_name(training.get("eval_strategy")) == "steps":
        training["eval_steps"] = training.get("save_steps", UNTIL_CHOSEN)
    return replace(settings, training=training)


def room_for_tokens(shape: ModelConfig, dtype: torch.dtype, device: torch.device, fast: bool) -> int:
    """How many tokens a micro-batch may have: what half of the free memory holds beside the weights.

    The fast engine recomputes what does not fit, so a token takes what each layer is entered with, and one layer at
    work. The plain engine keeps all layers and whole logits.
    """
    hidden, layers, width = int(shape.hidden_size), int(shape.num_hidden_layers), dtype.itemsize
    mlp, vocabulary = int(shape.intermediate_size), int(shape.vocab_size)
    weights = (layers * (4 * hidden * hidden + 3 * hidden * mlp) + 2 * vocabulary * hidden) * width
    at_work = 4 * (10 * hidden + 6 * mlp)
    a_token = layers * hidden * width + at_work if fast else layers * at_work + 12 * vocabulary
    return max(1, int((free_bytes(device) - weights) // 2 // a_token))


def parameters_a_rank(settings: Settings, shape: ModelConfig) -> int:
    """LoRA's parameters for each rank, with the layers that `peft_config` names."""
    model = adapted_shape(settings, shape, torch.float32)
    total = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    return max(1, total // int(settings.peft["r"]))


def choose(
    settings: Settings, ground: Ground, steps_of: Callable[[Settings], Steps], recorded: Mapping[str, Any]
) -> tuple[Settings, list[Choice]]:
    """The settings with numbers for all that was left open, and what was chosen with the reasons.

    A given value that is far from its rule is among the choices, with what to expect of it.

    Args:
        steps_of: counts the steps of a run with settings that have a batch and epochs.
        recorded: what the run chose when it began, by `section.key`, if it goes on.
    """
    work = _Work(settings, ground, recorded)
    _rank(work)
    _length(work)
    _batch(work)
    _epochs(work)
    steps = steps_of(work.settings)
    _rate(work, steps.count)
    _warmup(work, steps.count)
    _intervals(work, steps)
    work.settings = replace(work.settings, auto=frozenset())
    return work.settings, work.choices


def with_choices(config: RunConfig, choices: list[Choice]) -> RunConfig:
    """The configuration with what was chosen as numbers."""
    sections: dict[str, dict[str, Any]] = {
        name: {key: value for key, value in section.items() if not _is_auto(key, value)}
        for name, section in (("peft_config", config.peft_config), ("training_config", config.training_config))
    }
    sections["evaluation"] = {}
    for choice in choices:
        section, _, key = choice.key.partition(".")
        if not choice.given:
            sections[section][key] = choice.value
    evaluation = config.evaluation.model_copy(update=sections.pop("evaluation"))
    return config.model_copy(update={**sections, "evaluation": evaluation})


def _is_auto(key: str, value: Any) -> bool:
    return (value == AUTO and key != "pad_to_multiple_of") or (value == RACE and key == "learning_rate")


@dataclass
class _Work:
    settings: Settings
    ground: Ground
    recorded: Mapping[str, Any]
    choices: list[Choice] = field(default_factory=list)

    def is_open(self, key: str) -> bool:
        return key in self.settings.auto

    def value(self, key: str, default: Any = None) -> Any:
        return (self.settings.peft if key in AUTO_PEFT else self.settings.training).get(key, default)

    def take(self, key: str, value: Any, why: str) -> Any:
        """Take a chosen value, or the one with which the run began."""
        section = "peft_config" if key in AUTO_PEFT else "evaluation" if key == SCORED else "training_config"
        name = f"{section}.{key}"
        if name in self.recorded:
            value, why = self.recorded[name], "as when the run began"
        if section == "peft_config":
            self.settings = replace(self.settings, peft={**self.settings.peft, key: value})
        elif section == "training_config":
            self.settings = replace(self.settings, training={**self.settings.training, key: value})
        self.choices.append(Choice(name, value, why))
        return value

    def remark(self, key: str, why: str) -> None:
        section = "peft_config" if key in AUTO_PEFT else "training_config"
        self.choices.append(Choice(f"{section}.{key}", self.value(key), why, given=True))


def _rank(work: _Work) -> None:
    ground = work.ground
    wanted = rules.rank(ground.trained, ground.a_rank, ground.hidden // 2)
    if work.is_open("r"):
        total = wanted * ground.a_rank
        outnumber = "outnumber" if total > ground.trained else "come nearest to"
        work.take("r", wanted, f"{total:,} parameters of LoRA {outnumber} {ground.trained:,} trained tokens")
    elif work.value("r") * ground.a_rank * rules.FAR < ground.trained:
        held = work.value("r") * ground.a_rank
        work.remark(
            "r", f"{held:,} parameters for {ground.trained:,} trained tokens; r: {wanted} can hold more of them"
        )
    if work.is_open("lora_alpha"):
        rslora = bool(work.settings.peft.get("use_rslora"))
        alpha = rules.alpha(int(work.value("r")), rslora)
        work.take("lora_alpha", alpha, f"the learning rate's rule was fitted with {rules.ALPHA}, at any rank")
    elif work.is_open("learning_rate"):
        _tell_far_alpha(work)


def _tell_far_alpha(work: _Work) -> None:
    """The rule of the learning rate knows one scale of the update; another one is another rate."""
    rank = int(work.value("r"))
    wanted = rules.alpha(rank, bool(work.settings.peft.get("use_rslora")))
    far = rules.times(float(work.value("lora_alpha")), wanted)
    if far:
        why = (
            f"{far} the {wanted} that the learning rate's rule was fitted with at r: {rank}; give a learning_rate, too"
        )
        work.remark("lora_alpha", why)


def _length(work: _Work) -> None:
    if work.is_open("max_length"):
        longest, cap = work.ground.longest, work.ground.cap
        streamed = work.ground.rows is None
        chosen = cap if streamed else rules.length(longest, cap)
        why = "the rows are a stream" if streamed else f"the longest chat has {longest:,} tokens"
        work.take("max_length", chosen, f"{why}; {cap:,} at most by model, memory and the rule")


def _batch(work: _Work) -> None:
    ground = work.ground
    micro_open, steps_open = work.is_open("per_device_train_batch_size"), work.is_open("gradient_accumulation_steps")
    wanted = rules.BATCHES[-1] if ground.rows is None else rules.batch(ground.rows)
    rows = "a stream" if ground.rows is None else f"{ground.rows:,} rows"
    why = f"{wanted} rows a step, since LoRA wants small ones and there are {rows}"
    if wanted < (least := ground.least_batch * ground.processes):
        wanted, why = least, f"{least} rows a step, since this objective needs {ground.least_batch} in a micro-batch"
    if micro_open and steps_open:
        micro, more = rules.split_batch(wanted, ground.longest, ground.room, ground.processes)
        work.take("per_device_train_batch_size", micro, why)
        work.take("gradient_accumulation_steps", more, f"{micro * ground.longest:,} tokens at most fit at a time")
    elif micro_open:
        given = int(work.value("gradient_accumulation_steps"))
        share = max(1, wanted // given)
        micro, _ = rules.split_batch(share * ground.processes, ground.longest, ground.room, ground.processes)
        step = micro * given * ground.processes
        why = why if step == wanted else f"{step} rows a step, as gradient_accumulation_steps is {given}"
        work.take("per_device_train_batch_size", micro, why)
        _tell_large(work, "gradient_accumulation_steps", step, wanted)
    elif steps_open:
        work.take("gradient_accumulation_steps", 1, "per_device_train_batch_size says how many rows a step has")
    if not micro_open:
        step = work.value("per_device_train_batch_size") * work.value("gradient_accumulation_steps", 1)
        _tell_large(work, "per_device_train_batch_size", step * ground.processes, wanted)


def _tell_large(work: _Work, key: str, step: int, wanted: int) -> None:
    far = rules.times(step, wanted)
    if far and step > wanted:
        work.remark(key, f"{step} rows a step are {far} the rule's {wanted}; LoRA learns less in large steps")


def _epochs(work: _Work) -> None:
    rows = work.ground.rows
    if rows is None or int(work.value("max_steps") or -1) > 0:
        return
    wanted = rules.epochs(rows, work.ground.unlike)
    if work.is_open("num_train_epochs"):
        but = f", but these have little in common ({_in_one_row(work)})" if wanted < rules.epochs(rows) else ""
        work.take("num_train_epochs", wanted, f"{rows:,} rows: small sets are taken oftener{but}")
    elif work.value("num_train_epochs") >= FEW_ROWS_FOR_EPOCHS * wanted:
        work.remark("num_train_epochs", f"the rule's is {wanted} for {rows:,} rows; expect rows to be learnt by heart")


def _times_taken(work: _Work, steps: int) -> float:
    """How often a run of so many steps takes each row."""
    step = work.value("per_device_train_batch_size") * work.value("gradient_accumulation_steps", 1)
    return float(steps * step * work.ground.processes / (work.ground.rows or math.inf))


def _in_one_row(work: _Work) -> str:
    return f"{work.ground.in_one_row:.0%} of the pairs of tokens stand in one row only"


def _rate(work: _Work, steps: int) -> None:
    by_heart = work.ground.unlike and _times_taken(work, steps) >= rules.SEVERAL
    wanted = rules.two_digits(rules.learning_rate(work.ground.hidden, steps, by_heart) * work.ground.rate)
    width = f"hidden size {work.ground.hidden:,}"
    if work.is_open("learning_rate"):
        short = f", and higher for a run of {steps} steps" if steps < rules.SHORT_RUN else ""
        other = "" if work.ground.rate == 1 else f", times {work.ground.rate:g} for this objective"
        half = f", and half of it: {_in_one_row(work)}, and epochs teach that by heart" if by_heart else ""
        work.take("learning_rate", wanted, f"the fit for LoRA at {width}{short}{other}{half}")
        return
    given = float(work.value("learning_rate"))
    far = rules.times(given, wanted)
    if far:
        little = f"expect little to be learnt in {steps:,} steps"
        expect = little if given < wanted else "expect spikes, and answers that fall apart"
        work.remark("learning_rate", f"{far} the rule's {wanted:g} for {width}; {expect}")


def _warmup(work: _Work, steps: int) -> None:
    if not work.is_open("warmup_steps"):
        _tell_long_warmup(work, steps)
        return
    if plain_name(work.value("lr_scheduler_type", "linear")) in ("constant", "greedy", "reduce_lr_on_plateau"):
        return
    wanted = rules.warmup(steps)
    short = f"a run of {steps:,} steps is short, and LoRA begins at no change"
    why = f"{rules.WARMUP_SHARE:.0%} of {steps:,} steps, {rules.LONGEST_WARMUP} at most" if wanted else short
    work.take("warmup_steps", wanted, why)


def _tell_long_warmup(work: _Work, steps: int) -> None:
    given = float(work.value("warmup_steps") or 0)
    rising = given if given >= 1 else given * steps
    if rising > steps / 2:
        work.remark("warmup_steps", f"the learning rate still rises in {min(1, rising / steps):.0%} of {steps:,} steps")


def _intervals(work: _Work, steps: Steps) -> None:
    """When held-out rows are scored and checkpoints written; and that the best is kept, where nobody said otherwise."""
    interval = _evaluations(work, steps)
    saves = plain_name(work.value("save_strategy", "steps"))
    if work.is_open("save_steps") and saves == "steps":
        by = "save_strategy" if work.is_open("save_strategy") else None
        if interval and work.value("eval_strategy") == "steps":
            work.take("save_steps", interval, "each evaluation has its checkpoint")
        else:
            work.take(
                "save_steps", rules.save_interval(steps.count), f"{rules.CHECKPOINTS} checkpoints in the run at most"
            )
        if by and work.settings.training.get("save_total_limit") is None:
            work.take("save_total_limit", 2, "the newest two checkpoints, and the best")
    if interval:
        _keep_the_best(work, steps.count, interval)


def _evaluations(work: _Work, steps: Steps) -> int | None:
    """The interval of evaluations; None if there are none, or if they are not counted in steps."""
    training, ground = work.settings.training, work.ground
    if not work.is_open("eval_steps"):
        value = training.get("eval_steps")
        return int(value) if value and value >= 1 and training.get("eval_strategy") == "steps" else None
    strategy = plain_name(training.get("eval_strategy") or "no")
    if strategy == "epoch" and work.is_open("eval_strategy"):
        work.take("eval_strategy", "epoch", "each checkpoint is scored on the held-out chats")
    if strategy != "steps":
        return None
    asked = not work.is_open("eval_strategy") or any(training.get(key) for key in NEEDS_EVALUATIONS)
    wanted = asked or ground.wants_evaluations
    begun_with_a_part = f"evaluation.{SCORED}" in work.recorded
    all_of_them = rules.evaluation_interval(steps.count, steps.tokens, ground.held_out, False)
    if all_of_them and wanted:  # not fewer than where none could be afforded
        all_of_them = rules.evaluation_interval(steps.count, steps.tokens, ground.held_out, True)
    found = (None if begun_with_a_part else all_of_them) or _part(work, steps, wanted)
    if found is None and wanted:
        found = rules.evaluation_interval(steps.count, steps.tokens, ground.held_out, True)
    if found is None:
        share = f"{rules.EVALUATION_SHARE:.0%}"
        work.take("eval_strategy", "no", f"two evaluations would take over {share} of the time of training")
        return None
    save = training.get("save_steps")
    if save and not work.is_open("save_steps") and save >= 1:
        found = rules.together(int(save), found)
    if work.is_open("eval_strategy"):
        work.take("eval_strategy", "steps", "there are held-out chats, so the run shows where it stops getting better")
    return int(work.take("eval_steps", found, f"at most {rules.EVALUATIONS} evaluations in {steps.count:,} steps"))


def _part(work: _Work, steps: Steps, wanted: bool) -> int | None:
    """The interval of evaluations of some of the held-out rows, where all of them take too long; None if all are
    scored, or if those that there is time for are too few to tell anything.
    """
    ground, of = work.ground, work.ground.held_out_rows
    begun_with, begun = work.recorded.get(f"evaluation.{SCORED}"), "training_config.eval_steps" in work.recorded
    if of is None or (begun and begun_with is None):
        return None
    rows = begun_with or rules.scored_rows(steps.tokens, ground.held_out, of, wanted)
    if rows is None or rows >= of:
        return None
    share = f"{rules.EVALUATION_SHARE:.0%}"
    why = f"two evaluations of all {of:,} held-out chats would take over {share} of the time of training"
    taken = int(work.take(SCORED, rows, why))
    interval = rules.evaluation_interval(steps.count, steps.tokens, ground.held_out * taken // of, True)
    return min(interval or steps.count, math.ceil(steps.count / rules.LOOKS))


def _keep_the_best(work: _Work, steps: int, interval: int) -> None:
    training = work.settings.training
    save = training.get("save_steps")
    if not work.is_open("eval_strategy") or plain_name(training.get("eval_strategy")) != "steps":
        return
    if (
        not (work.is_open("save_steps") and work.is_open("save_strategy"))
        or not save
        or save % interval
        or save > steps
    ):
        return
    if training.get("load_best_model_at_end") is not None:
        return
    work.take("load_best_model_at_end", True, "the checkpoint that is best on held-out chats is kept")
    if not training.get("metric_for_best_model"):
        work.take("metric_for_best_model", "loss", "the held-out loss says which is best")
        work.take("greater_is_better", False, "less loss is better")
