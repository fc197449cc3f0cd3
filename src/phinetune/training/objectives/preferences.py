"""What the objectives that learn from preferences share: pairs in a packed row, their numbers, and what is told."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from phinetune.config.section import Section
from phinetune.data.prepare.encode_answers import PairRows
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.training.objectives.objective import Objective, PackedRow, RowLoss, Sums

CHOSEN_REFERENCE, REJECTED_REFERENCE = "ref_chosen_logps", "ref_rejected_logps"
# How the logits are spread that the answers' labels are chosen from: their entropy in nats, and the mean logit.
SPREAD = ("entropy", "logits/chosen", "logits/rejected")
# Of the learning rate that suits imitation, since pairs ask for small moves from where the model stands. It gives 1e-5
# for Phi-3 mini, ten times TRL's 1e-6, which is for training all weights.
RATE = 0.03


class PreferenceOptions(Section):
    """The knobs that all of these objectives have."""

    beta: float = Field(0.1, gt=0, description="how strongly the model is held to where it started")
    disable_dropout: bool = Field(True, description="train without dropout, as TRL's preference trainers do")


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected answers of a packed row's pairs.

    Attributes:
        logps: the summed log-probability of each answer's labels in nats, shape (pairs), differentiable.
        tokens: how many labels each has, shape (pairs).
        correct: how many of them are the model's first choice, shape (pairs).
        entropy: the summed entropy of what they are chosen from, in nats, shape (pairs).
        logits: the summed mean logit there, shape (pairs).
        reference: `logps` by the reference, shape (pairs); None where the objective has no reference.
        whole_logps, whole_tokens: as `logps` and `tokens`, with the labels of the prompt; None where it has none.
    """

    logps: Tensor
    tokens: Tensor
    correct: Tensor
    entropy: Tensor
    logits: Tensor
    reference: Tensor | None = None
    whole_logps: Tensor | None = None
    whole_tokens: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """log π/π_ref of each answer, shape (pairs)."""
        assert self.reference is not None
        return self.logps - self.reference

    @property
    def mean_logps(self) -> Tensor:
        """The log-probability of a label, the mean over each answer, shape (pairs)."""
        return self.logps / self.tokens


class PairObjective(Objective):
    """An objective over pairs. Each example is the chosen conversation, then the rejected one.

    A loss may have parts that are averaged over other things than pairs, over labels for example. Then `total` and
    `items` have an entry for each part.
    """

    rows: ClassVar[type[RowEncoder]] = PairRows
    owned = True
    can_fill = False
    rate = RATE
    parts: ClassVar[tuple[str, ...]] = ("pairs",)  # what the parts of the loss are averaged over
    measured: ClassVar[tuple[str, ...]] = (
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    )
    less_is_better = ("rewards/rejected", "logps/rejected", "nll_loss")

    def __init__(self, options: Section) -> None:
        super().__init__(options)
        self.metrics = ("loss", *self.measured, *SPREAD, "token_accuracy")  # type: ignore[misc]
        by_part = [f"{what}_{part}" for what in ("total", "items") for part in self.parts]
        counts = ("pairs", "correct", "chosen_tokens", "rejected_tokens")
        self.sums = (*by_part, *self.measured, *SPREAD, *counts)  # type: ignore[misc]

    @abstractmethod
    def pair_losses(self, chosen: Side, rejected: Side) -> Tensor:
        """The loss of each pair, shape (pairs)."""

    def rewards(self, side: Side) -> Tensor:
        """The implicit reward of each answer, shape (pairs)."""
        return self.beta * (side.logps if side.reference is None else side.ratios)

    def shown_logps(self, side: Side) -> Tensor:
        """The log-probabilities that are logged, shape (pairs)."""
        return side.logps

    def chosen_likelihood(self, entry: Mapping[str, Any]) -> tuple[float, float] | None:
        return beside_reference(entry, self.beta)

    @property
    def beta(self) -> float:
        return float(self.options.beta)  # type: ignore[attr-defined]

    def items(self, row: PackedRow) -> Tensor:
        """Pairs; and the labels of the chosen conversations where a part is averaged over them."""
        pairs: Tensor = row["conversations"] // 2
        return pairs if len(self.parts) == 1 else torch.stack([pairs, (row["owners"][:, 1] % 2 == 0).sum()])

    def sides(self, model: Any, row: PackedRow) -> tuple[Side, Side]:
        """The chosen and the rejected answers of a packed row."""
        out = model(**row, spread=True)
        columns = (out.log_probs, out.count, out.correct, out.entropy, out.logits)
        chosen, rejected = (Side(*(one[i::2] for one in columns)) for i in (0, 1))
        references = (row.get(name) for name in (CHOSEN_REFERENCE, REJECTED_REFERENCE))
        liked, other = (replace(side, reference=one) for side, one in zip((chosen, rejected), references, strict=True))
        return liked, other

    def loss(self, model: Any, row: PackedRow) -> RowLoss:
        total, items, sums = self._counted(model, row)
        return RowLoss(total, items, self._means(sums))

    @torch.no_grad()
    def score(self, model: Any, batch: Mapping[str, Any]) -> Sums:
        total, items, sums = self._counted(model, batch)
        return {
            **dict(zip((f"total_{part}" for part in self.parts), total.reshape(-1).tolist(), strict=True)),
            **dict(zip((f"items_{part}" for part in self.parts), items.reshape(-1).tolist(), strict=True)),
            **{name: float(value) for name, value in sums.items()},
        }

    def summarize(self, sums: Sums) -> dict[str, float]:
        loss = sum(sums[f"total_{part}"] / max(1.0, sums[f"items_{part}"]) for part in self.parts)
        return {"loss": loss, **{name: float(value) for name, value in self._means(sums).items()}}

    def _counted(self, model: Any, row: PackedRow) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss of a row by parts, what they are averaged over, and the sums of what is measured."""
        chosen, rejected = self.sides(model, row)
        total, items = self.losses(chosen, rejected, row)
        return total, items, self.sums_of(chosen, rejected)

    def losses(self, chosen: Side, rejected: Side, row: PackedRow) -> tuple[Tensor, Tensor]:
        """The summed loss and what it is averaged over; each a scalar, or with an entry for each part."""
        return self.pair_losses(chosen, rejected).sum(), self.items(row)

    @torch.no_grad()
    def sums_of(self, chosen: Side, rejected: Side) -> dict[str, Tensor]:
        """The sums over pairs of what is measured, without gradients."""
        liked, other = self.rewards(chosen), self.rewards(rejected)
        return {
            "rewards/chosen": liked.sum(),
            "rewards/rejected": other.sum(),
            "rewards/accuracies": (liked > other).float().sum(),
            "rewards/margins": (liked - other).sum(),
            "logps/chosen": self.shown_logps(chosen).sum(),
            "logps/rejected": self.shown_logps(rejected).sum(),
            "entropy": chosen.entropy.sum() + rejected.entropy.sum(),
            "logits/chosen": chosen.logits.sum(),
            "logits/rejected": rejected.logits.sum(),
            "pairs": torch.tensor(float(len(chosen.logps))),
            "correct": chosen.correct.sum(),
            "chosen_tokens": chosen.tokens.sum(),
            "rejected_tokens": rejected.tokens.sum(),
        }

    def _means(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        means = {name: sums[name] / at_least_one(sums["pairs"]) for name in self.measured}
        tokens = at_least_one(sums["chosen_tokens"])
        return {**means, **spread_means(sums), "token_accuracy": sums["correct"] / tokens}


def beside_reference(entry: Mapping[str, Any], beta: float) -> tuple[float, float]:
    """`chosen_likelihood` where each answer is held against the same one by the reference: the part that it changed by.

    Both numbers are sums over answers, so their ratio doesn't hang on the answers' lengths.
    """
    return entry["rewards/chosen"] / beta / max(1e-6, abs(entry["logps/chosen"])), 1.0


def spread_means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The means of `SPREAD` over the answers' labels; those of answers that are not there are left out."""
    chosen, rejected = float(sums["chosen_tokens"]), float(sums["rejected_tokens"])
    over = {"entropy": chosen + rejected, "logits/chosen": chosen, "logits/rejected": rejected}
    return {name: sums[name] / over[name] for name in SPREAD if over[name]}


def at_least_one(count: Any) -> float:
    return max(1.0, float(count))
