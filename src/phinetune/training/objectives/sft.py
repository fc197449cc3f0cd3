"""Supervised fine-tuning: the answers of chats are learnt token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer
from trl import SFTTrainer

from phinetune.engine.scoring import Score, score_batch
from phinetune.training.objectives.objective import Objective, PackedRow, RowLoss, Sums
from phinetune.training.trainer import PlainTrainer


class PlainSftTrainer(PlainTrainer, SFTTrainer):
    """TRL's `SFTTrainer` with this project's checkpoints, evaluation and checks."""


class Sft(Objective):
    """The mean negative log-likelihood of a labelled token, as TRL's `SFTTrainer` has it (`loss_type: nll`)."""

    kind = "sft"
    likelihood = True
    sums = ("nll", "correct", "tokens")
    metrics = ("loss", "perplexity", "token_accuracy")

    def items(self, row: PackedRow) -> Tensor:
        """Labels; one that several conversations share counts for each of them."""
        count: Tensor = row["weights"].sum()
        return count

    def loss(self, model: Any, row: PackedRow) -> RowLoss:
        out = model(**row)
        return RowLoss(out.nll, out.count, {"token_accuracy": out.correct / out.count})

    def score(self, model: Any, batch: Mapping[str, Any]) -> Sums:
        return dict(vars(score_batch(model, batch)))

    def summarize(self, sums: Sums) -> dict[str, float]:
        score = Score(sums["nll"], int(sums["correct"]), int(sums["tokens"]))
        return {"loss": score.loss, "perplexity": score.perplexity, "token_accuracy": score.token_accuracy}

    def plain_trainer(self) -> type[Trainer]:
        return PlainSftTrainer
