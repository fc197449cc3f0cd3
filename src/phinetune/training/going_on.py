"""How a run that stopped goes on: at the next row of its epoch, with the settings that are in force now.

transformers goes on exactly where nothing has changed. It finds the place by batches of the size that is set now, and
it takes intervals, learning rate and optimizer settings from the checkpoint. So where something has changed, rows would
be left out, and new settings would have no effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from phinetune.training.balance import holder_of_rows
from phinetune.training.row_place import PartOfAnEpoch, RowsFrom, Stretch


@dataclass(frozen=True)
class GoingOn:
    """What a run that goes on with something changed needs.

    Attributes:
        stretch: where it goes on, and with which steps. None: transformers finds the place, since all steps of the run
            have the same size.
        renewed: whether optimizer and schedule take the settings that are in force now.
        forget_best: whether the best evaluation up to here can't be compared with those to come.
    """

    stretch: Stretch | None = None
    renewed: bool = False
    forget_best: bool = False


class GoingOnTrainer(Trainer):
    """A trainer that goes on with a run in which something may have changed.

    Attributes:
        going_on: set before `train`, of a run that is resumed.
    """

    going_on = GoingOn()

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As the parent, but the steps that are left are counted from the place."""
        values: list[Any] = list(super().set_initial_training_values(args, dataloader))
        place, per_epoch = self.going_on.stretch, values[1]
        if place:
            if args.max_steps <= 0:
                values[-1] = place.last_step(len(dataloader.dataset), args.num_train_epochs)
            values[0] = place.epoch + 1 + math.ceil(max(0, values[-1] - place.step) / per_epoch)
        return tuple(values)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As the parent, but the intervals are those that are set now, and a best one that counts no more is gone."""
        epochs, batches = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self.forget_best()
        place = self.going_on.stretch
        return (place.epoch, 0) if place else (epochs, batches)

    def forget_best(self) -> None:
        """Take the evaluations up to here out of the state if they can't be compared with those to come."""
        if self.going_on.forget_best:
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
            self.state.log_history = [e for e in self.state.log_history if not any(k.startswith("eval_") for k in e)]

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # the parent calls it by names alone
        """As the parent; the epoch that the run goes on in begins at the next row."""
        place, rows = self.going_on.stretch, kwargs["train_dataloader"]
        if place is None or place.row == 0 or kwargs["epoch"] != place.epoch:
            super()._run_epoch(**kwargs)  # type: ignore[no-untyped-call]
            return
        holder = holder_of_rows(rows)
        whole = holder.sampler
        holder.sampler = RowsFrom(whole, place.row)
        part = PartOfAnEpoch(place.epoch, place.row / len(whole))
        self.add_callback(part)
        steps = math.ceil(len(rows) / self.args.gradient_accumulation_steps)
        try:
            counts = {"steps_in_epoch": len(rows), "num_update_steps_per_epoch": steps}
            super()._run_epoch(**kwargs | counts)  # type: ignore[no-untyped-call]
        finally:
            holder.sampler = whole
            self.remove_callback(part)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the parent, but with `renewed` only the states are taken from the checkpoint, no settings."""
        optimizer: Any = self.optimizer
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        rates = list(getattr(scheduler, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.going_on.renewed:
            return
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = rates
            now = [rate * share(scheduler.last_epoch) for rate, share in zip(rates, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(optimizer.param_groups, now, strict=True):
                group["lr"] = rate
            scheduler._last_lr = now
