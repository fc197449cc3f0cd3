"""The trainers of a run: what all share, the fast engine's, and what the plain engine's add to TRL's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import Subset
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from phinetune import processes
from phinetune.checkpoints.quantize import is_quantized
from phinetune.config.engine import EngineSection
from phinetune.engine.fast_engine import FastEngine
from phinetune.engine.sharding import is_sharded, shard_layers
from phinetune.training.averaging import averaged
from phinetune.training.balance import Lengths, WithinSteps, batches_of, step_shape
from phinetune.training.best_checkpoint import check_counted
from phinetune.training.callbacks import SamplesWriter
from phinetune.training.finite import FiniteSteps
from phinetune.training.log_sums import LogSums
from phinetune.training.objectives.objective import Objective
from phinetune.training.saving import CheckpointTrainer
from phinetune.training.spikes import SpikeWatch

# Of a model: what its answers give (by metric), and some of these answers as they go into samples.jsonl.
Look = Callable[[PeftModel], tuple[dict[str, float], list[dict[str, Any]]]]


class RunTrainer(CheckpointTrainer):
    """What every trainer of a run does, over any of transformers' or TRL's.

    A loss, a gradient or an adapter that is not finite stops the run. What has been added up for the next logged line
    goes into checkpoints. An evaluation adds up what its objective counts and keeps no logits.
    Nothing is reported to anyone who was not named in `report_to`.

    Attributes:
        finite: looks at each step, and knows which steps were skipped.
        scored: the places of the held-out rows that evaluations score; None is all.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        look: Look | None = None,
        samples: SamplesWriter | None = None,
        spikes: SpikeWatch | None = None,
        nonfinite: EngineSection | None = None,
        spread: bool = False,
        scored: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective: Objective = objective
        self.spread, self.scored = spread, scored
        self.look, self.samples, self.spikes = look, samples, spikes
        self._sums: LogSums | None = None  # of the checkpoint that the run goes on from, until they are taken up
        super().__init__(**kwargs)
        self.finite = FiniteSteps(nonfinite or EngineSection(), lambda ids: str(self.tokenizer.decode(ids.tolist())))
        self.add_callback(self.finite)

    def before_training(self) -> None:
        """Spread the base over the processes, where that is asked for and there are several."""
        if self.spread and self.args.world_size > 1 and not is_sharded(self.peft_model):
            shard_layers(self.peft_model, self.args.device)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """As the parent; of several processes DDP keeps what is trained alike, and never sends the frozen base."""
        if not training or self.args.world_size <= 1 or self.is_deepspeed_enabled or isinstance(model, DDP):
            return super()._wrap_model(model, training, dataloader)
        return averaged(model, self.accelerator)

    def _send_telemetry(self) -> None:
        """Send nothing. TRL reports the kind of every run to the hub unless CI is set."""

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the lengths of rows on disk: `group_by_length` would read all rows to count them."""
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        named = list(dict.fromkeys([*columns, self.args.length_column_name]))
        self._signature_columns = named  # type: ignore[assignment]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = dict(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.finite.saw(rows, loss)
        if self.spikes:
            self.spikes.saw(rows, loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent; the next logged loss is added up from nothing, also after one that is not a number."""
        if "loss" in logs:
            self._tr_loss.zero_()  # the parent subtracts the sum from itself, which leaves nan for nan
        super().log(logs, start_time)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self.finite.measured(norm)
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.finite.check_saved(self.peft_model, self.state.global_step)
        super()._save_checkpoint(model, trial)

    def save_final(self) -> None:
        self.finite.check_saved(self.peft_model, self.state.global_step)
        super().save_final()

    def _save_rng_state(self, output_dir: str) -> None:
        """As the parent; and what the next logged line is the mean of."""
        super()._save_rng_state(output_dir)
        metrics = {name: list(values) for name, values in self._open_metrics().items()}
        sums = LogSums(float(self._tr_loss), self._globalstep_last_logged, metrics, self.finite.skipped)
        sums.write(Path(output_dir), self.args.process_index)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent, but the first logged line of a run that goes on counts from the last one before."""
        if isinstance(resume_from_checkpoint, str):
            self._sums = LogSums.read(Path(resume_from_checkpoint), self.args.process_index)
            self.finite.skipped = list(self._sums.skipped) if self._sums else []
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # the parent calls it by names alone
        """As the parent, but the first logged line counts what a checkpoint kept of it."""
        sums, self._sums = self._sums, None
        if sums:
            self._tr_loss += sums.loss
            self._globalstep_last_logged = sums.since
            self._open_metrics().update({name: list(values) for name, values in sums.metrics.items()})
        super()._run_epoch(**kwargs)

    def _open_metrics(self) -> dict[str, list[float]]:
        """The numbers since the last logged line, by metric."""
        return {}

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count real tokens: by the mask, since the padding token may be one that chats contain."""
        mask = inputs.get("attention_mask")  # packed rows have none, and no padding
        packed = inputs.get("row_tokens", inputs["input_ids"].numel())
        count = torch.as_tensor(packed if mask is None else mask.sum(), device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(count).sum())

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; without rows of its own it scores those at `scored`."""
        if eval_dataset is None and self.scored is not None:
            rows: Any = self.eval_dataset
            eval_dataset = rows.select(self.scored) if isinstance(rows, Dataset) else Subset(rows, self.scored)
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the parent's, but several processes get each row once: an uneven rest is not filled up with repeats."""
        before, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.accelerator.even_batches = before

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The objective's metrics over all held-out rows, batch by batch; then what `look` finds."""
        model = self.peft_model.eval()
        metrics = self._scored(model, dataloader)
        if self.look:
            found, samples = self.look(model)
            metrics |= found
            if self.samples:
                self.samples.write(self.state, samples)
        check_counted(self.args.metric_for_best_model, metrics)
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=self.num_examples(dataloader),
        )

    def score(self, rows: Any) -> dict[str, float]:
        """The objective's metrics over some of the held-out rows. Model and random numbers are left as they were."""
        model = self.peft_model
        training = model.training
        with torch.random.fork_rng():  # a loader draws a number when it begins
            found = self._scored(model.eval(), self.get_eval_dataloader(rows))
        model.train(training)
        return found

    def _scored(self, model: PeftModel, batches: Any) -> dict[str, float]:
        total = dict.fromkeys(self.objective.sums, 0.0)
        for batch, counts in self._in_step(model, batches):
            with self.compute_loss_context_manager():
                for name, value in self.objective.score(model, self._prepare_inputs(batch)).items():
                    total[name] += value * counts
        return self.objective.summarize(self._reduced(total))

    def _in_step(self, model: PeftModel, batches: Any) -> Iterator[tuple[Any, bool]]:
        """This process's batches, and whether each counts.

        Where the model is spread over the processes, one that has no batch left computes a row that does not count,
        as long as another process has one.
        """
        if not is_sharded(model):
            yield from ((batch, True) for batch in batches)
            return
        own, rows = iter(batches), self.eval_dataset
        while processes.any_of((batch := next(own, None)) is not None):
            spare = None if batch is not None else self.data_collator([rows[0]])  # type: ignore[index,list-item]
            yield (spare if batch is None else batch), batch is not None

    def _reduced(self, sums: dict[str, float]) -> dict[str, float]:
        """The sums over all processes."""
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.args.device)
        return dict(zip(sums, self.accelerator.reduce(values, reduction="sum").tolist(), strict=True))


class FastTrainer(RunTrainer):
    """transformers' `Trainer` on the fast engine: a step's examples are packed rows, the objective gives their loss."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the items of the whole step

    def __init__(
        self,
        *,
        model: PeftModel,
        engine: FastEngine,
        objective: Objective,
        lengths: Lengths | None = None,
        **kwargs: Any,
    ) -> None:
        self.engine, self.lengths = engine, lengths
        self._row_metrics: dict[str, list[float]] = defaultdict(list)
        collator = engine.collator(model.config, owned=objective.owned, columns=objective.columns)
        if isinstance(kwargs["train_dataset"], IterableDataset):  # packed rows are of unlike size, so none is cut up
            kwargs["args"].accelerator_config.dispatch_batches = False
        super().__init__(model=model, objective=objective, data_collator=collator, **kwargs)

    def before_training(self) -> None:
        super().before_training()
        sharded = self.args.world_size > 1 or self.is_fsdp_enabled
        self.engine.set_up(self.peft_model, self.args.device, sharded=sharded)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent; then the base's weights lie as they did before."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.engine.give_back(self.peft_model)

    def get_train_dataloader(self) -> Any:
        """As the parent's, but several processes get alike many tokens in a step, where the rows' lengths are known."""
        loader = super().get_train_dataloader()
        if self.args.world_size > 1 and self.lengths is not None and self.objective.alone:
            batches = batches_of(loader)
            batches.sampler = WithinSteps(batches.sampler, self.lengths, step_shape(self.args))
        return loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A packed row's summed loss over the items of the whole step."""
        row = self.objective.loss(model, inputs)
        loss = (row.total / (row.items if num_items_in_batch is None else num_items_in_batch)).sum()
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes, each a part of the sum
        for name, value in row.metrics.items():
            self._row_metrics[name].append(float(value))
        return (loss, row) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The items of all micro-batches of a step, over all processes."""
        if not batch_samples:
            return None
        count = torch.stack([self.objective.items(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum(0)
        return count

    def _open_metrics(self) -> dict[str, list[float]]:
        return self._row_metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent; a training log has the means of the objective's metrics since the last one.

        They are those of all processes, of which each may have other metrics: not every micro-batch has all of them.
        """
        if "loss" in logs:
            logs |= _means(processes.gathered({name: [sum(v), len(v)] for name, v in self._row_metrics.items()}))
            self._row_metrics.clear()
        super().log(logs, start_time)


def _means(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """The mean of each metric, from the sum and the count that each process has of it."""
    sums: dict[str, tuple[float, float]] = {}
    for name, (total, count) in (item for part in parts for item in part.items()):
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)
    return {name: total / count for name, (total, count) in sums.items()}


class PlainTrainer(RunTrainer):
    """What the plain engine's trainers add to TRL's own, which computes the loss and puts the adapter on the model."""

    def __init__(self, *, loaded: Any, **kwargs: Any) -> None:
        super().__init__(model=loaded.model, loaded=loaded, **kwargs)
        if is_quantized(loaded.model):
            _undo_rounding(self.peft_model)

    def _open_metrics(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = vars(self)["_metrics"]["train"]  # TRL's own
        return found


def _undo_rounding(model: PeftModel) -> None:
    """TRL rounds all that is trained over a quantised base to bfloat16. Here adapters train in float32.

    What `modules_to_save` trains is a copy of a part of the model. It keeps the model's dtype and values, since outside
    autocast it meets activations of that dtype.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                for trained, original in zip(copy.parameters(), wrapper.original_module.parameters(), strict=True):
                    trained.data = original.data.clone()
