"""Odds-ratio preference optimisation (Hong et al. 2024): imitation and preference in one loss, without a reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from phinetune.data.prepare.encode_answers import WholePairRows
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.training.objectives.objective import PackedRow
from phinetune.training.objectives.preferences import PairObjective, PreferenceOptions, Side


class Orpo(PairObjective):
    """The mean negative log-likelihood of a token of the chosen chats, minus beta times the mean log odds ratio.

    The likelihood is that of prompt and answer, the odds are those of the answers, as in TRL's `ORPOTrainer`.
    """

    kind = "orpo"
    Options = PreferenceOptions
    rows: ClassVar[type[RowEncoder]] = WholePairRows
    parts = ("pairs", "labels")
    measured = (*PairObjective.measured, "log_odds_ratio", "log_odds_chosen")

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.metrics = (*self.metrics, "nll_loss")  # type: ignore[misc]
        self.sums = (*self.sums, "nll", "nll_tokens")  # type: ignore[misc]

    def sides(self, model: Any, row: PackedRow) -> tuple[Side, Side]:
        """As the parent's, for the answers alone; the chosen side has the sums over its whole conversations too."""
        owners, count = row["owners"], int(row["conversations"])
        whole = owners[owners[:, 1] % 2 == 0]
        whole = torch.stack([whole[:, 0], count + whole[:, 1] // 2], dim=1)
        groups = torch.cat([owners[_in_answers(row)], whole])
        total = torch.tensor(count + count // 2)
        out = model(**{**row, "owners": groups, "conversations": total}, spread=True)
        columns = (out.log_probs, out.count, out.correct, out.entropy, out.logits)
        chosen, rejected = (Side(*(one[i:count:2] for one in columns)) for i in (0, 1))
        return replace(chosen, whole_logps=out.log_probs[count:], whole_tokens=out.count[count:]), rejected

    def losses(self, chosen: Side, rejected: Side, row: PackedRow) -> tuple[Tensor, Tensor]:
        assert chosen.whole_logps is not None
        pairs = self.pair_losses(chosen, rejected).sum()
        return torch.stack([pairs, -chosen.whole_logps.sum()]), self.items(row)

    def pair_losses(self, chosen: Side, rejected: Side) -> Tensor:
        return -self.beta * logsigmoid(log_odds(chosen.mean_logps, rejected.mean_logps))

    def rewards(self, side: Side) -> Tensor:
        return self.beta * side.mean_logps

    def shown_logps(self, side: Side) -> Tensor:
        """The mean log-probability of an answer's label, as TRL logs it."""
        return side.mean_logps

    def chosen_likelihood(self, entry: Any) -> tuple[float, float] | None:
        """The mean log-probability of an answer's label, as it is logged: there is no reference."""
        return entry["logps/chosen"], abs(entry["logps/chosen"])

    @torch.no_grad()
    def sums_of(self, chosen: Side, rejected: Side) -> dict[str, Tensor]:
        assert chosen.whole_logps is not None
        assert chosen.whole_tokens is not None
        odds = log_odds(chosen.mean_logps, rejected.mean_logps)
        return {
            **super().sums_of(chosen, rejected),
            "log_odds_ratio": logsigmoid(odds).sum(),
            "log_odds_chosen": odds.sum(),
            "nll": -chosen.whole_logps.sum(),
            "nll_tokens": chosen.whole_tokens.sum(),
        }

    def _means(self, sums: Any) -> dict[str, Any]:
        return {**super()._means(sums), "nll_loss": sums["nll"] / max(1.0, float(sums["nll_tokens"]))}


def _in_answers(row: PackedRow) -> Tensor:
    """Which of a row's pairs of label and conversation lie in an answer, and not in the prompt of a chosen one."""
    owner = row["owners"][:, 1]
    counts = torch.bincount(owner, minlength=int(row["conversations"]))
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    before = torch.zeros_like(counts)
    before[::2] = row["prompt_labels"].to(counts)
    return place >= before[owner]


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The log of odds(chosen) / odds(rejected), odds(p) = p / (1 − p), from mean log-probabilities (equations 4, 7)."""
    return (chosen - rejected) - (_log_not(chosen) - _log_not(rejected))


def _log_not(log_p: Tensor) -> Tensor:
    """log(1 − p) of log p, exact near 0 and near 1."""
    near_one = log_p > -0.6931471805599453
    safe = torch.where(near_one, log_p, torch.full_like(log_p, -1.0))
    other = torch.where(near_one, torch.full_like(log_p, -1.0), log_p)
    return torch.where(near_one, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(other)))
