"""What an objective is: the rows it takes, the loss of a packed row, the metrics, and what a plan must know of it.

A run's trainer, checkpoints, callbacks, report and plan know objectives by this class alone. A new objective is one
file here and one entry in the registry (`phinetune.training.objectives.registry`); the help of `objective.kind` names
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from transformers import Trainer

from phinetune.chats.encoder import ChatEncoder
from phinetune.config.data import DataSection
from phinetune.config.section import Section
from phinetune.data.prepare.encode_rows import RowEncoder

PackedRow = Mapping[str, Any]  # what `phinetune.engine.packing.pack` makes, on the model's device
Sums = dict[str, float]


@dataclass(frozen=True)
class RowLoss:
    """What an objective makes of one packed row.

    Attributes:
        total: the loss summed over the row's items, a float32 scalar with a gradient. The trainer divides it by the
            items of the whole step, over all micro-batches and processes. A loss of several parts has an entry for
            each, shape (parts); they are divided each by its own items, then added up.
        items: how many there are, as `Objective.items` counts them.
        metrics: numbers of this row for the log, scalars. A log step shows their mean over its micro-batches.
    """

    total: Tensor
    items: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """What a run trains for.

    Class attributes:
        kind: its name in the configuration.
        Options: its knobs beside `kind`.
        rows: how rows become encoded examples.
        owned: whether it needs the log-probabilities of each conversation, and not only one sum a packed row.
        can_fill: whether rows may be filled with several examples (`data.packing: tokens`).
        sums: the names of what `score` gives.
        metrics: what every evaluation counts; `loss` is always among them.
        less_is_better: those of its own metrics of which a smaller number is the better one.
        likelihood: whether its loss is nats a token, of which 0 means knowing each token beforehand.
        rate: what the learning rate that suits supervised fine-tuning is multiplied by where none is given.
        least_batch: rows that a micro-batch has at least where the rules choose.
        alone: whether a row's loss is the same whatever rows are beside it in a micro-batch.
        reference: columns for the log-probabilities of an example's conversations by the model as it stands when the
            run starts, one for each conversation. They are there when `loss` and `score` are called.
        training_defaults: values of `training_config` where the user gives none.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[Section]] = Section
    rows: ClassVar[type[RowEncoder]] = RowEncoder
    owned: ClassVar[bool] = False
    can_fill: ClassVar[bool] = True
    sums: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    less_is_better: ClassVar[tuple[str, ...]] = ()
    likelihood: ClassVar[bool] = False
    rate: ClassVar[float] = 1.0
    least_batch: int = 1
    alone: ClassVar[bool] = True
    reference: ClassVar[tuple[str, ...]] = ()
    training_defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, options: Section) -> None:
        self.options = options

    @property
    def columns(self) -> tuple[str, ...]:
        """The numbers of each example that a packed row has."""
        return (*self.rows.columns, *self.reference)

    def row_encoder(self, section: DataSection, encoder: ChatEncoder, max_length: int | None) -> RowEncoder:
        """How this run's rows become examples."""
        return self.rows(section, encoder, max_length)

    def refused(self, training: Mapping[str, Any]) -> list[str]:
        """A sentence for each value of `training_config` that this objective can't train with."""
        return []

    def row_tokens(self, tokens: Any) -> Any:
        """Tokens of rows as `arranged` gives them, from those of the rows as they are encoded; for a plan."""
        return tokens

    def arranged(self, rows: Any, batch_size: int, max_length: int | None) -> Any:
        """The rows of a set as the trainer takes them.

        Args:
            batch_size: the rows of a micro-batch.
            max_length: how many tokens a conversation may have; None is no limit.
        """
        return rows

    def arrangement(self, rows: Any) -> Any:
        """What tells rows that `arranged` returned from others that it makes of the same set, as JSON holds it."""
        return None

    @abstractmethod
    def items(self, row: PackedRow) -> Tensor:
        """What a packed row's loss is averaged over: labels, say, or pairs. A scalar, or shape (parts)."""

    @abstractmethod
    def loss(self, model: Any, row: PackedRow) -> RowLoss:
        """The loss of a packed row. `model` is called as `model(**row)`; see `phinetune.engine.phi3`.

        A plan times this very function, so it knows of every forward pass that it makes.
        """

    @abstractmethod
    def score(self, model: Any, batch: Mapping[str, Any]) -> Sums:
        """The `sums` over a held-out batch, without gradients. Those of all batches and processes are added up."""

    @abstractmethod
    def summarize(self, sums: Sums) -> dict[str, float]:
        """The numbers of `metrics` from the sums over all held-out rows."""

    def chosen_likelihood(self, entry: Mapping[str, Any]) -> tuple[float, float] | None:
        """How likely the chosen answers of a log line are, and the size that a change of it is a part of.

        Lines are of other rows each, so it must not hang on how long their answers are. None where no answers are
        chosen.
        """
        return None

    def labels(self, tokens: int, share: float) -> int:
        """Labels in a packed row of so many tokens, where this share of all tokens is trained on; for a plan."""
        return max(1, round(tokens * share))

    def plain_trainer(self) -> type[Trainer] | None:
        """The trainer of the plain engine: a `RunTrainer` over one of TRL's. None where there is none."""
        return None
