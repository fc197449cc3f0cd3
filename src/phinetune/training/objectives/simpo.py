"""SimPO (Meng et al. 2024) and CPO (Xu et al. 2024): preferences without a reference, by the answers' likelihood.

The losses and their names are those of TRL's `CPOTrainer`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from phinetune.training.objectives.objective import PackedRow
from phinetune.training.objectives.preferences import PairObjective, PreferenceOptions, Side


class SimpoOptions(PreferenceOptions):
    """The knobs of `trl.CPOConfig` that say what is learnt."""

    loss_type: Literal["simpo", "sigmoid", "hinge", "ipo", "alphapo"] = Field(
        "simpo", description="simpo, or one of CPO's; simpo and ipo take the mean over an answer's labels"
    )
    simpo_gamma: float = Field(0.5, description="simpo: the margin that is aimed at")
    cpo_alpha: float = Field(1.0, ge=0, description="weight of the chosen answers' likelihood; 0 is SimPO as published")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="simpo, sigmoid: the share of pairs taken as flipped")
    alpha: float = Field(0.0, description="AlphaPO's shape of the reward; 0 is the log-probability")

    @model_validator(mode="before")
    @classmethod
    def _alphapo(cls, value: Any) -> Any:
        """AlphaPO is SimPO without the likelihood."""
        if isinstance(value, dict) and value.get("loss_type") == "alphapo":
            return {**value, "loss_type": "simpo", "cpo_alpha": 0.0}
        return value


class Simpo(PairObjective):
    """The mean loss of a pair, and `cpo_alpha` times the mean negative log-likelihood of a chosen label."""

    kind = "simpo"
    Options = SimpoOptions
    parts = ("pairs", "labels")

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.metrics = (*self.metrics, "nll_loss")  # type: ignore[misc]
        self.sums = (*self.sums, "nll")  # type: ignore[misc]

    def losses(self, chosen: Side, rejected: Side, row: PackedRow) -> tuple[Tensor, Tensor]:
        pairs = self.pair_losses(chosen, rejected).sum()
        return torch.stack([pairs, -self.options.cpo_alpha * chosen.logps.sum()]), self.items(row)  # type: ignore[attr-defined]

    def pair_losses(self, chosen: Side, rejected: Side) -> Tensor:
        options: Any = self.options
        margin: Tensor = self._shaped(chosen) - self._shaped(rejected)
        if options.loss_type == "hinge":
            return torch.relu(1 - self.beta * margin)
        if options.loss_type == "ipo":
            return torch.square(margin - 1 / (2 * self.beta))
        if options.loss_type == "simpo":
            margin = margin - options.simpo_gamma / self.beta
        scaled, smooth = self.beta * margin, float(options.label_smoothing)
        return -logsigmoid(scaled) * (1 - smooth) - logsigmoid(-scaled) * smooth

    def rewards(self, side: Side) -> Tensor:
        return self.beta * self._shaped(side)

    def shown_logps(self, side: Side) -> Tensor:
        """The mean over an answer's labels, where the loss takes it."""
        averaged = self.options.loss_type in ("simpo", "ipo")  # type: ignore[attr-defined]
        return side.mean_logps if averaged else side.logps

    def chosen_likelihood(self, entry: Any) -> tuple[float, float] | None:
        """A label's log-probability: some of these losses take sums over answers, and there is no reference."""
        return -entry["nll_loss"], abs(entry["nll_loss"])

    def _shaped(self, side: Side) -> Tensor:
        """The reward over beta: log p, or AlphaPO's (1 − p^−α) / α."""
        logps, alpha = self.shown_logps(side), self.options.alpha  # type: ignore[attr-defined]
        return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha

    @torch.no_grad()
    def sums_of(self, chosen: Side, rejected: Side) -> dict[str, Tensor]:
        return {**super().sums_of(chosen, rejected), "nll": -chosen.logps.sum()}

    def _means(self, sums: Any) -> dict[str, Any]:
        return {**super()._means(sums), "nll_loss": sums["nll"] / max(1.0, float(sums["chosen_tokens"]))}
