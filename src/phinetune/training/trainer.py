"""TRL's `SFTTrainer` with this project's checkpoints, evaluation and checks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from phinetune.checkpoints.adapters import BASE_FILE
from phinetune.checkpoints.load import Loaded
from phinetune.checkpoints.quantize import is_quantized
from phinetune.engine.choice import Engine
from phinetune.engine.scoring import Score, score_batch
from phinetune.errors import RunError
from phinetune.files import publish_files, publish_folder
from phinetune.training.callbacks import SamplesWriter

# Of a model: what its answers give (by metric), and some of these answers as they go into samples.jsonl.
Look = Callable[[PeftModel], tuple[dict[str, float], list[dict[str, Any]]]]


class ChatTrainer(SFTTrainer):
    """Trains a LoRA on ready `input_ids` and `labels`.

    Different from its parent: a checkpoint appears whole or not at all and holds no pickled arguments;
    evaluation weighs tokens, not batches, and keeps no logits; a loss that is not finite stops the run; nothing
    is reported to anyone who was not named in `report_to`. With an engine, a step's chats are one packed row.
    """

    def __init__(
        self,
        *,
        loaded: Loaded,
        args: SFTConfig,
        engine: Engine | None = None,
        look: Look | None = None,
        samples: SamplesWriter | None = None,
        **kwargs: Any,
    ) -> None:
        self.base, self.tokenizer = loaded.base, loaded.tokenizer
        self.generation = loaded.model.generation_config
        self.folder = Path(str(args.output_dir))
        self._stage: Path | None = None
        self.engine, self.look, self.samples = engine, look, samples
        if engine:
            kwargs["data_collator"] = engine.collator(loaded.model)
        super().__init__(model=loaded.model, args=args, processing_class=loaded.tokenizer, **kwargs)
        if is_quantized(loaded.model):  # TRL rounds the adapters to bfloat16 there; they train in float32 here
            for parameter in self.peft_model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    @property
    def peft_model(self) -> PeftModel:
        """The model with its adapter, out of whatever a launcher wrapped around it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PeftModel)
        return model

    # -- saving ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Let the parent fill a staging folder, then rename what it made to `checkpoint-N`."""
        final = self.folder / f"checkpoint-{self.state.global_step}"
        self._stage = final.parent / f".{final.name}.partial-0"
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish_checkpoint(self._stage / final.name, final)
            self.accelerator.wait_for_everyone()
        finally:
            if self.args.should_save:
                shutil.rmtree(self._stage, ignore_errors=True)
            self._stage = None

    def _publish_checkpoint(self, staged: Path, final: Path) -> None:
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)  # the parent wrote the staging folder's name
            self.state.save_to_json(str(staged / "trainer_state.json"))
        publish_folder(staged, final)
        rotate_checkpoints(
            output_dir=str(self.folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Adapter, tokenizer, stop ids, and which base it belongs to."""
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.folder), self.peft_model
        # Tokens are never added, so there is no embedding to save (and no hub to ask about it).
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run's own comes at its end
        self.tokenizer.save_pretrained(str(folder))
        self.generation.save_pretrained(str(folder))
        (folder / BASE_FILE).write_text(self.base.to_json(), encoding="utf-8")

    def save_final(self) -> None:
        """The adapter as it is now, into the run folder itself: staged, then each file renamed into place."""
        if self.args.should_save:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".adapter.partial-") as stage:
                self.save_model(stage, _internal_call=True)
                publish_files(Path(stage), self.folder)
        else:
            self.save_model(str(self.folder), _internal_call=True)  # writes nothing, and gives a sharded model's part
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run's card is written once, at its end, with its results (`phinetune.export.hub.card`)."""

    def _send_telemetry(self) -> None:
        """Nothing is sent: TRL reports the kind of every run to the hub unless CI is set."""

    # -- resuming -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent, but a checkpoint at the last step is loaded and not trained one step further."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
            if state.global_step >= max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        if self.engine:
            self.engine.set_up(self.peft_model, self.args.device)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the lengths of rows on disk: `group_by_length` would read all rows to count them."""
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        columns: list[str] = self._signature_columns or []
        named = list(dict.fromkeys([*columns, self.args.length_column_name]))
        self._signature_columns = named  # type: ignore[assignment]

    # -- training and evaluating ----------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss):
            raise RunError(self._not_finite(float(loss), ids))
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of a packed row: its labels' summed loss over those of the whole step; token accuracy besides."""
        if "segments" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        out = model(**inputs)
        count = out.count if num_items_in_batch is None else num_items_in_batch
        loss = out.nll / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes, each a part of the sum
        self._metrics["train"]["mean_token_accuracy"].append(float(out.correct / out.count))
        return (loss, out) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The labels of all micro-batches of a step, over all processes; a shared label counts for each row."""
        if not batch_samples or "weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count real tokens: by the mask, since the padding token may be one that chats contain."""
        mask = inputs.get("attention_mask")  # packed rows have none, and no padding
        packed = inputs.get("row_tokens", inputs["input_ids"].numel())
        count = torch.as_tensor(packed if mask is None else mask.sum(), device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(count).sum())

    def _not_finite(self, loss: float, ids: torch.Tensor) -> str:
        starts = [self.tokenizer.decode(row[:24].tolist()) for row in ids]
        return (
            f"the loss became {loss} at step {self.state.global_step + 1}, so the run stopped; earlier checkpoints "
            f"are kept. Try a lower learning_rate, or bf16 in place of fp16. The batch began: "
            + " | ".join(repr(start) for start in starts[:4])
        )

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
        """Loss, perplexity and token accuracy over all labelled tokens, batch by batch; then what `look` finds."""
        model = self.peft_model.eval()
        total = Score()
        for batch in dataloader:
            with self.compute_loss_context_manager():
                total = total + score_batch(model, self._prepare_inputs(batch))
        total = self._reduced(total)
        metrics = {"loss": total.loss, "perplexity": total.perplexity, "token_accuracy": total.token_accuracy}
        if self.look:
            found, samples = self.look(model)
            metrics |= found
            if self.samples:
                self.samples.write(self.state, samples)
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=self.num_examples(dataloader),
        )

    def _reduced(self, score: Score) -> Score:
        sums = torch.tensor([score.nll, score.correct, score.tokens], dtype=torch.float64, device=self.args.device)
        nll, correct, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return Score(nll, int(correct), int(tokens))
