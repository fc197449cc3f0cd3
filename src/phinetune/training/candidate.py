"""Several runs on the same rows and the same base: what differs is set anew, all else is made and loaded once.

A candidate is the run that the same numbers, given by hand, would be: equal to the bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from phinetune.checkpoints.load import Loaded
from phinetune.engine.peft_variants import moves_the_base
from phinetune.training.auto_settings import AUTO_PEFT, AUTO_TRAINING
from phinetune.training.prepare import PreparedRun, with_chosen
from phinetune.training.run import load_for

# What trains parts of the base itself, or leaves wrappers around them.
TOUCHES_THE_BASE = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")


def candidate(
    rows: PreparedRun, values: Mapping[str, Any], output_dir: Path, recorded: Mapping[str, Any] | None = None
) -> PreparedRun:
    """The run with these values, and with numbers for all that is still left open.

    Args:
        rows: of `prepare_rows`: a run whose rows are prepared and in which nothing was chosen. It stays as it is.
        values: by key of `peft_config` (`r`, `lora_alpha`) or `training_config` (any other). Of a key that may be left
            open, the run counts it as chosen, so that `--resume` takes it even where the configuration says `auto`.
        output_dir: where the candidate is written.
        recorded: of a candidate that goes on, what it chose when it began, by `section.key`.
    """
    opened = values.keys() & {*AUTO_PEFT, *AUTO_TRAINING}
    known = {f"{'peft_config' if key in AUTO_PEFT else 'training_config'}.{key}": values[key] for key in opened}
    given = {key: value for key, value in values.items() if key not in opened}
    settings = replace(
        rows.settings,
        training={**rows.settings.training, **given, "output_dir": str(output_dir)},
        auto=(rows.settings.auto | opened) - given.keys(),
        race=False,
    )
    sections = {
        "peft_config": {key: value for key, value in rows.config.peft_config.items() if key not in opened},
        "training_config": {
            **{key: value for key, value in rows.config.training_config.items() if key not in opened},
            **given,
            "output_dir": str(output_dir),
        },
    }
    run = replace(rows, settings=settings, config=rows.config.model_copy(update=sections))
    return with_chosen(run, {**(recorded or {}), **known})


@dataclass
class SharedBase:
    """The base of several runs, one after the other, loaded once where an adapter can be taken off it without a trace.

    Where it can't (the plain engine, adapters that change their base), each run loads it anew.
    """

    _loaded: Loaded | None = None

    def take(self, prepared: PreparedRun) -> Loaded:
        """The base without an adapter; it belongs to the run until `give_back`."""
        loaded, self._loaded = self._loaded, None
        return loaded or load_for(prepared)

    def give_back(self, prepared: PreparedRun, loaded: Loaded, model: PeftModel) -> None:
        """Take the adapter off the base, for the next run.

        Args:
            model: what the run made of `loaded`.
        """
        if can_be_shared(prepared):
            base: Any = model.unload()
            assert base is loaded.model
            self._loaded = loaded


def can_be_shared(prepared: PreparedRun) -> bool:
    """Whether the base is as it was, once the adapter of such a run is taken off."""
    peft = prepared.settings.peft
    touched = any(peft.get(key) for key in TOUCHES_THE_BASE) or peft.get("bias", "none") != "none"
    compiled = prepared.engine.fast is None or prepared.engine.fast.compile
    return not (touched or compiled or moves_the_base(peft))
