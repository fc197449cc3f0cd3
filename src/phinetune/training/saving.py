"""How a run is saved and resumed, over any of transformers' trainers."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from phinetune.checkpoints.adapters import BASE_FILE
from phinetune.checkpoints.load import Loaded
from phinetune.errors import RunError
from phinetune.files import publish_files, publish_folder
from phinetune.manifest import damage, write_manifest
from phinetune.run_folder import RunFolder
from phinetune.training.beginning import Beginning
from phinetune.training.best_checkpoint import EarlyStop
from phinetune.training.going_on import GoingOnTrainer

logger = logging.getLogger(__name__)


class CheckpointTrainer(GoingOnTrainer):
    """Saves checkpoints whole or not at all, without pickled arguments, and resumes from them.

    Attributes:
        folder: the run's.
        beginning: of an adapter that changed its base; None for any other.
        started_from: the adapter that training went on from; None for a new one.
    """

    def __init__(self, *, loaded: Loaded, started_from: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        self.started_from = started_from
        self.base, self.tokenizer = loaded.base, loaded.tokenizer
        self.generation = loaded.model.generation_config
        self.folder = Path(str(kwargs["args"].output_dir))
        self._stage: Path | None = None
        super().__init__(processing_class=loaded.tokenizer, **kwargs)
        self.beginning = Beginning.of(self.peft_model)

    @property
    def peft_model(self) -> PeftModel:
        """The model with its adapter, out of whatever a launcher wrapped around it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PeftModel)
        return model

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Let the parent fill a staging folder, then rename what it made to `checkpoint-N`."""
        final = self.folder / f"checkpoint-{self.state.global_step}"
        self._stage = final.parent / f".{final.name}.partial-0"
        try:
            super()._save_checkpoint(model, trial)
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
        write_manifest(staged)
        publish_folder(staged, final)
        RunFolder(self.folder).replace()
        rotate_checkpoints(
            output_dir=str(self.folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write adapter, tokenizer, stop ids, and which base the adapter belongs to."""
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.folder), self.peft_model
        # Tokens are never added, so there is no embedding to save (and no hub to ask about it).
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
        if self.beginning:
            self.beginning.widen(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run's own comes at its end
        self.tokenizer.save_pretrained(str(folder))
        self.generation.save_pretrained(str(folder))
        (folder / BASE_FILE).write_text(self.base.to_json(self.started_from), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.beginning:
            self.beginning.load(Path(resume_from_checkpoint), self.peft_model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As the parent, but the best checkpoint is looked for in this folder, wherever it was when it was written."""
        place = super()._init_training_state(max_steps, *args, **kwargs)
        self._find_best()
        return place

    def _find_best(self) -> None:
        """Set the state's best checkpoint to the folder that holds it now; None if it is gone, which is told.

        Raises:
            RunError: it is to be loaded at the end, and is damaged.
        """
        step, self.state.best_model_checkpoint = self.state.best_global_step, None
        if not step:
            return
        best, wanted = self.folder / f"checkpoint-{step}", self.args.load_best_model_at_end
        if best.is_dir():
            faults = damage(best) if wanted else []
            if faults:
                raise RunError(
                    f"{best}, the best checkpoint up to here, is to be loaded at the end, and can't be: "
                    f"{', '.join(faults)}; delete it, and `--resume` goes on with the other checkpoints"
                )
            self.state.best_model_checkpoint = str(best)
        elif wanted:
            logger.warning(
                "%s, the best checkpoint up to here, is not there; unless a later one is better, the run ends with "
                "the adapter of its last step",
                best,
            )

    def _load_best_model(self) -> None:
        self._find_best()  # again: hours may have passed
        if self.state.best_model_checkpoint is None:
            return
        if self.beginning:
            self.beginning.load(Path(self.state.best_model_checkpoint), self.peft_model)
        else:
            super()._load_best_model()

    def save_final(self) -> None:
        """Write the adapter as it is now into the run folder itself: staged, then each file renamed into place."""
        if self.args.should_save:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".adapter.partial-") as stage:
                self.save_model(stage, _internal_call=True)
                write_manifest(Path(stage))
                publish_files(Path(stage), self.folder)
            RunFolder(self.folder).replace()
        else:
            self.save_model(str(self.folder), _internal_call=True)  # writes nothing, and gives a sharded model's part
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run's card is written once, at its end, with its results (`phinetune.exporting.hub.card`)."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent, but a run that has come to its end at the checkpoint is not trained one step further."""
        if isinstance(resume_from_checkpoint, str) and self._has_ended(resume_from_checkpoint):
            self._load_from_checkpoint(resume_from_checkpoint)
            if self.args.load_best_model_at_end:
                self._load_best_model()
            return TrainOutput(self.state.global_step, 0.0, {})
        self.before_training()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _has_ended(self, checkpoint: str) -> bool:
        """Whether a run is at its last step or has stopped early at a checkpoint. Then the state is that one's."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        early = next((one for one in self.callback_handler.callbacks if isinstance(one, EarlyStop)), None)
        stopped = early is not None and not self.going_on.forget_best and early.has_stopped(self.args, state)
        if state.global_step < max_steps and not stopped:
            return False
        if stopped:
            logger.info("the run has stopped early at step %d: nothing more is trained", state.global_step)
        self.state = state
        self.forget_best()
        return True

    def before_training(self) -> None:
        """What has to be done before the first step."""
