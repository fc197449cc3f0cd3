"""Direct preference optimisation (Rafailov et al. 2023) and its kin: a chosen answer against a rejected one.

The losses and their names are those of TRL's `DPOTrainer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from phinetune.training.objectives.objective import PackedRow
from phinetune.training.objectives.preferences import (
    CHOSEN_REFERENCE,
    REJECTED_REFERENCE,
    PairObjective,
    PreferenceOptions,
    Side,
)


class DpoOptions(PreferenceOptions):
    """The knobs of `trl.DPOConfig` that say what is learnt."""

    loss_type: list[str] = Field(["sigmoid"], min_length=1, description="one loss or several of the table `LOSSES`")
    loss_weights: list[float] | None = Field(None, description="the weight of each loss; 1 each if left out")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="robust, exo_pair: the share of pairs whose preference is taken to be wrong"
    )
    discopop_tau: float = Field(0.05, gt=0, description="discopop: how sharply it turns from one loss to the other")

    @field_validator("loss_type", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fit_together(self) -> DpoOptions:
        unknown = [name for name in self.loss_type if name not in (*LOSSES, "sft")]
        if unknown:
            raise ValueError(f"there is no loss_type `{unknown[0]}` (there are {', '.join((*LOSSES, 'sft'))})")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} entries of loss_type"
            )
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0, as in TRL; 1e-3 is usual")
        return self


class Dpo(PairObjective):
    """The mean loss of a pair; with `sft` among the losses also the mean negative log-likelihood of a chosen label."""

    kind = "dpo"
    Options = DpoOptions
    reference = (CHOSEN_REFERENCE, REJECTED_REFERENCE)
    parts = ("pairs", "labels")

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        weights = options.loss_weights or [1.0] * len(options.loss_type)
        self.weighted = [
            (name, weight) for name, weight in zip(options.loss_type, weights, strict=True) if name != "sft"
        ]
        self.sft = sum(weight for name, weight in zip(options.loss_type, weights, strict=True) if name == "sft")

    def losses(self, chosen: Side, rejected: Side, row: PackedRow) -> tuple[Tensor, Tensor]:
        pairs = self.pair_losses(chosen, rejected).sum()
        return torch.stack([pairs, -self.sft * chosen.logps.sum()]), self.items(row)

    def pair_losses(self, chosen: Side, rejected: Side) -> Tensor:
        total = torch.zeros_like(chosen.logps)
        assert isinstance(self.options, DpoOptions)
        for name, weight in self.weighted:
            total = total + weight * LOSSES[name](chosen, rejected, self.options)
        return total


def _margin(chosen: Side, rejected: Side) -> Tensor:
    """How much more the chosen answer gained than the rejected one, shape (pairs)."""
    return chosen.ratios - rejected.ratios


def _mean_margin(chosen: Side, rejected: Side) -> Tensor:
    """The same for the means over each answer's labels, shape (pairs)."""
    return chosen.ratios / chosen.tokens - rejected.ratios / rejected.tokens


def _sigmoid(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Rafailov et al. 2023, equation 7."""
    return -logsigmoid(options.beta * _margin(chosen, rejected))


def _sigmoid_norm(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """The same for the mean over an answer's labels, so that long answers have no advantage."""
    return -logsigmoid(options.beta * _mean_margin(chosen, rejected))


def _hinge(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """SLiC, Zhao et al. 2023, with the margin scaled by beta."""
    return torch.relu(1 - options.beta * _margin(chosen, rejected))


def _ipo(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Azar et al. 2023, equation 17, for the mean over an answer's labels as TRL has it; beta is their tau."""
    return torch.square(_mean_margin(chosen, rejected) - 1 / (2 * options.beta))


def _robust(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Chowdhury et al. 2024: unbiased where a share of the preferences is flipped."""
    scaled, flipped = options.beta * _margin(chosen, rejected), options.label_smoothing
    return (-(1 - flipped) * logsigmoid(scaled) + flipped * logsigmoid(-scaled)) / (1 - 2 * flipped)


def _exo_pair(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Ji et al. 2024, equation 16: the reverse KL divergence from smoothed preferences."""
    scaled, smooth = options.beta * _margin(chosen, rejected), options.label_smoothing
    better = torch.sigmoid(scaled) * (logsigmoid(scaled) - math.log1p(-smooth))
    return better + torch.sigmoid(-scaled) * (logsigmoid(-scaled) - math.log(smooth))


def _nca_pair(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Chen et al. 2024: noise contrastive alignment."""
    liked, other = options.beta * chosen.ratios, options.beta * rejected.ratios
    return -logsigmoid(liked) - 0.5 * logsigmoid(-liked) - 0.5 * logsigmoid(-other)


def _bco_pair(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Jung et al. 2024, for pairs."""
    return -logsigmoid(options.beta * chosen.ratios) - logsigmoid(-options.beta * rejected.ratios)


def _sppo_hard(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Wu et al. 2024, equation 4.7, where the chosen answer always wins."""
    return (chosen.ratios - 0.5 / options.beta) ** 2 + (rejected.ratios + 0.5 / options.beta) ** 2


def _apo_zero(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """D'Oosterlinck et al. 2024, equation 7: for chosen answers that are better than the model's own."""
    return 1 - torch.sigmoid(options.beta * chosen.ratios) + torch.sigmoid(options.beta * rejected.ratios)


def _apo_down(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """D'Oosterlinck et al. 2024, equation 8: for chosen answers that are worse than the model's own."""
    return torch.sigmoid(options.beta * chosen.ratios) + 1 - torch.sigmoid(options.beta * _margin(chosen, rejected))


def _discopop(chosen: Side, rejected: Side, options: DpoOptions) -> Tensor:
    """Lu et al. 2024, equation 5: between the logistic and the exponential loss, by the margin."""
    scaled = options.beta * _margin(chosen, rejected)
    share = torch.sigmoid(scaled / options.discopop_tau)
    return -logsigmoid(scaled) * (1 - share) + torch.exp(-scaled) * share


LOSSES: dict[str, Callable[[Side, Side, DpoOptions], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
