"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): single answers, each judged good or not.

The loss needs an estimate of how far the model has moved from its reference. As in TRL's `KTOTrainer`, it comes from
prompts with the answers of their neighbours: within each group of rows of a micro-batch's size, the answers move on by
one row. A pair's answers stand side by side, so the second ones come behind all others of their group there: an answer
to the very prompt would be no neighbour's. So a loss depends on its micro-batch, and rows are drawn in order, so that a
group is a micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor

from phinetune import processes
from phinetune.data.prepare.encode_answers import JudgedRows
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.engine.examples import IGNORED
from phinetune.training.objectives.objective import Objective, PackedRow, RowLoss, Sums
from phinetune.training.objectives.preferences import RATE, SPREAD, PreferenceOptions, beside_reference, spread_means
from phinetune.training.value_rules import plain_name

logger = logging.getLogger(__name__)

ROOMY = 4  # rows of a group in which each row has a neighbour of another prompt, however pairs lie in it


class KtoOptions(PreferenceOptions):
    """The knobs of `trl.KTOConfig` that say what is learnt."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="kto, or APO (D'Oosterlinck et al. 2024) for single answers, which needs no neighbours"
    )
    desirable_weight: float = Field(1.0, ge=0, description="weight of the good answers' losses")
    undesirable_weight: float = Field(1.0, ge=0, description="weight of the other answers' losses")


class Kto(Objective):
    """The mean loss of an answer. An example is its conversation and, for `kto`, one with its neighbour's answer."""

    kind = "kto"
    Options = KtoOptions
    rows: ClassVar[type[RowEncoder]] = JudgedRows
    alone: ClassVar[bool] = False  # the answers of a micro-batch tell how far the model has moved
    owned = True
    can_fill = False
    training_defaults: ClassVar[Mapping[str, Any]] = {
        "train_sampling_strategy": "sequential",
        # A row's neighbours are those of its micro-batch, so its size is not left to be chosen when the rows are known.
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    }
    rate = RATE
    metrics = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"),
        *SPREAD,
    )
    sums = (
        *("total", "chosen", "rejected", *metrics[1:3], *metrics[4:6], "kl", "batches"),
        *("chosen_tokens", "rejected_tokens", *SPREAD),
    )
    less_is_better = ("rewards/rejected", "logps/rejected", "kl")

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.neighbours = options.loss_type == "kto"
        self.least_batch = ROOMY if self.neighbours else 1
        self.reference = ("ref_logps", "ref_KL_logps") if self.neighbours else ("ref_logps",)  # type: ignore[misc]

    def refused(self, training: Mapping[str, Any]) -> list[str]:
        """Micro-batches of one have no neighbours, and in another order theirs are not those of the estimate."""
        if not self.neighbours:
            return []
        problems, other = [], "or set objective.loss_type: apo_zero_unpaired"
        if int(training.get("per_device_train_batch_size", 8)) < 2:
            problems.append(
                "training_config.per_device_train_batch_size: kto estimates how far the model has moved from the other "
                f"answers of a micro-batch, so it needs 2 or more; {other}"
            )
        strategy = plain_name(training.get("train_sampling_strategy", "sequential"))
        if strategy != "sequential":
            problems.append(
                f"training_config.train_sampling_strategy: {strategy}: kto needs `sequential`, since it "
                f"estimates from answers that stand side by side; {other}"
            )
        return problems

    def arranged(self, rows: Any, batch_size: int, max_length: int | None) -> Any:
        if not self.neighbours:
            return rows
        made = Neighbours(rows, batch_size, max_length)
        if made.seconds and batch_size < ROOMY:
            logger.warning(
                "kto: in micro-batches of %d, a pair's answers have no neighbours but each other, which spoils the "
                "estimate of how far the model has moved; set per_device_train_batch_size (and "
                "per_device_eval_batch_size) to %d or more",
                batch_size,
                ROOMY,
            )
        return made

    def arrangement(self, rows: Any) -> Any:
        return [rows.size, rows.max_length] if self.neighbours else None

    def row_tokens(self, tokens: Any) -> Any:
        """A row's prompt stands before two answers; the prompt is counted twice, as for every shared beginning."""
        return 2 * tokens if self.neighbours else tokens

    def items(self, row: PackedRow) -> Tensor:
        """Answers."""
        return torch.tensor(len(row["label"]))

    def loss(self, model: Any, row: PackedRow) -> RowLoss:
        sums, total = self._counted(model, row, together=True)
        return RowLoss(total, self.items(row), _means(sums))

    @torch.no_grad()
    def score(self, model: Any, batch: Mapping[str, Any]) -> Sums:
        sums, total = self._counted(model, batch, together=False)
        return {"total": float(total), **{name: float(value) for name, value in sums.items()}}

    def summarize(self, sums: Sums) -> dict[str, float]:
        loss = sums["total"] / max(1.0, sums["chosen"] + sums["rejected"])
        return {"loss": loss, **{name: float(value) for name, value in _means(sums).items()}}

    def chosen_likelihood(self, entry: Mapping[str, Any]) -> tuple[float, float] | None:
        return beside_reference(entry, float(self.options.beta))  # type: ignore[attr-defined]

    def _counted(self, model: Any, row: PackedRow, *, together: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The sums of what is measured, and the summed loss.

        Args:
            together: whether the other processes compute a micro-batch at the same time.
        """
        out, good = model(**row, spread=True), row["label"] > 0.5
        step = 2 if self.neighbours else 1
        logps = out.log_probs[::step]
        ratios = logps - row["ref_logps"]
        moved = self._moved(out.log_probs, row, together) if self.neighbours else logps.new_zeros(())
        total = self._weighted(ratios, good, moved)
        rewards = (self.options.beta * ratios).detach()  # type: ignore[attr-defined]
        return {
            "chosen": good.sum().float(),
            "rejected": (~good).sum().float(),
            "rewards/chosen": rewards[good].sum(),
            "rewards/rejected": rewards[~good].sum(),
            "logps/chosen": logps.detach()[good].sum(),
            "logps/rejected": logps.detach()[~good].sum(),
            "kl": moved.detach(),
            "batches": torch.ones(()),
            "chosen_tokens": out.count[::step][good].sum(),
            "rejected_tokens": out.count[::step][~good].sum(),
            "entropy": out.entropy[::step].sum(),
            "logits/chosen": out.logits[::step][good].sum(),
            "logits/rejected": out.logits[::step][~good].sum(),
        }, total

    @torch.no_grad()
    def _moved(self, log_probs: Tensor, row: PackedRow, together: bool) -> Tensor:
        """How far the model has moved: the mean log ratio to its reference of answers to other prompts, at least 0."""
        mean = (log_probs[1::2] - row["ref_KL_logps"]).mean()
        return (processes.mean(mean) if together else mean).clamp(min=0)

    def _weighted(self, ratios: Tensor, good: Tensor, moved: Tensor) -> Tensor:
        """The summed losses: equation 7 of the paper, or 7 of APO's where nothing is estimated."""
        options: Any = self.options
        liked = options.desirable_weight * (1 - torch.sigmoid(options.beta * (ratios - moved)))
        other = options.undesirable_weight * (1 - torch.sigmoid(options.beta * (moved - ratios)))
        return torch.where(good, liked, other).sum()


def _means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a log or an evaluation; those of answers that are not there are left out."""
    means: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        if float(sums[side]):
            means |= {f"{name}/{side}": sums[f"{name}/{side}"] / float(sums[side]) for name in ("rewards", "logps")}
    if len(means) == 4:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return {**means, **spread_means(sums), "kl": sums["kl"] / max(1.0, float(sums["batches"]))}


class Neighbours(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows with a second conversation each: their prompt with the answer of another row of their group.

    Args:
        rows: each of one conversation, with labels from its answer on; `second` is 1 for the second answer of a pair,
            which stands behind the first one.
        size: the rows of a group.
        max_length: tokens that the second conversation may have; its end is left out. None is no limit.
    """

    def __init__(self, rows: Any, size: int, max_length: int | None = None) -> None:
        self.rows, self.size, self.max_length = rows, size, max_length
        column = rows["second"] if isinstance(rows, Dataset) else (row["second"] for row in rows)
        self.seconds = frozenset(place for place, second in enumerate(column) if second)

    def __len__(self) -> int:
        return len(self.rows)

    def neighbour(self, place: int) -> int:
        """The row whose answer a row is given: the one before it in its group, of which the last is before the first.

        As TRL has it, a pair's second answer comes behind all first ones. Where a pair then stands side by side all the
        same, answers move on by more rows.
        """
        start = place - place % self.size
        group = range(start, min(start + self.size, len(self.rows)))
        order = sorted(group, key=lambda one: one in self.seconds)

        def apart(shift: int) -> bool:
            return not any(self._is_pair(one, order[i - shift]) for i, one in enumerate(order))

        return order[order.index(place) - next(filter(apart, range(1, len(order))), 1 % len(order))]

    def _is_pair(self, one: int, other: int) -> bool:
        return abs(one - other) == 1 and max(one, other) in self.seconds

    def __getitem__(self, place: int) -> dict[str, Any]:
        row, other = self.rows[place], self.rows[self.neighbour(place)]
        own, theirs = _answer_of(row), _answer_of(other)
        ids = [*row["input_ids"][:own], *other["input_ids"][theirs:]][: self.max_length]
        labels = [*[IGNORED] * own, *other["labels"][theirs:]][: self.max_length]
        return {
            **row,
            "input_ids": [*row["input_ids"], *ids],
            "labels": [*row["labels"], *labels],
            "seq_lengths": [len(row["input_ids"]), len(ids)],
        }


def _answer_of(row: Mapping[str, Any]) -> int:
    """Where a row's answer begins."""
    return next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
