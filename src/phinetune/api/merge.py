"""`merge`: a run merged into its base, and what that did to the held-out loss."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phinetune.api.held_out import held_out_chats
from phinetune.checkpoints.device import pick_device
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.opened import open_model, opened_config
from phinetune.config.run import RunConfig
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.engine.device_memory import free_bytes
from phinetune.engine.scoring import Score, score_rows
from phinetune.errors import DataError
from phinetune.exporting.base_files import trained_dtype
from phinetune.exporting.merge.merge import Merge, merge_run, record_losses
from phinetune.exporting.merge.merged import SIXTEEN_BIT
from phinetune.screen.console import Console, say, stderr
from phinetune.screen.merge import show_losses

SCORING_ROOM = 1.2  # memory that a model takes while it scores, as a multiple of its weights


def merge(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    base: str = "16bit",
    score: bool = True,
    console: Console | None = None,
    device: str = "auto",
) -> Merge:
    """Merge a run (or an adapter folder) into its base and write a transformers checkpoint without PEFT.

    Args:
        path: a run, one of its checkpoints or an adapter folder.
        out: a folder that is not there yet, or empty.
        dtype: float32, bfloat16 or float16; None keeps the dtype of the base's files.
        base: `16bit`, or for a run trained with `model.quantization` `quantized`: merge into what is left of the
            base's weights after that. A base whose files are quantised has these weights alone.
        score: measure base, adapter and merged model on the run's held-out chats, where it has any.
        console: where to print; standard error if left out.
        device: where they are measured.

    Raises:
        PhinetuneError: `out` is taken, or the run can't be merged.
    """
    console = console or stderr()
    pick_device(device)
    made = merge_run(path, out, dtype=dtype, base=base)
    say(console, made.report())
    if score:
        _score(Path(path).expanduser(), made, console, device)
    return made


def _score(path: Path, made: Merge, console: Console, device: str) -> None:
    """Measure the three models, show the losses and record them; where that can't be had, say why."""
    config = opened_config(path, device=device)
    try:
        reason = _why_not_scored(config, made, device)
        held_out = None if reason else held_out_chats(config, path)
    except DataError as error:
        reason, held_out = str(error), None
    if held_out is None:
        say(console, f"Held-out loss not measured: {reason}")
        return
    say(console, f"Scoring {len(held_out)} held-out chats with base, adapter and merged model …")
    scores = _three_scores(path, config, made, held_out)
    record_losses(made, {side: one.loss for side, one in scores.items()})
    show_losses(scores, console)


def _three_scores(path: Path, config: RunConfig, made: Merge, held_out: ChatSet) -> dict[str, Score]:
    """The scores of `base`, `adapter` and `merged`, one model in memory at a time."""
    scored = _scorer(config, held_out)
    opened = open_model(path, config)
    with opened.model.disable_adapter():
        scores = {"base": scored(opened.model)}
    scores["adapter"] = scored(opened.model)
    del opened
    gc.collect()  # a PEFT model is held by cycles
    written = {"path": str(made.path), "dtype": made.record["dtype"]}
    unadapted = {"revision": None, "tokenizer": None, "quantization": "none"}
    section = config.model.model_copy(update=written | unadapted)
    scores["merged"] = scored(load_base(section, fast=config.engine.kind == "fast").model)
    return scores


def _scorer(config: RunConfig, held_out: ChatSet) -> Callable[[Any], Score]:
    batch = config.evaluation.batch_size

    def scored(model: Any) -> Score:
        return sum(score_rows(model, held_out.encoded, None if batch == "auto" else batch), Score())

    return scored


def _why_not_scored(config: RunConfig, made: Merge, device: str) -> str | None:
    if config.data.eval is None and config.data.test is None:
        return "no held-out chats are recorded for this run"
    quantized = config.model.quantization != "none" or made.record["base_weights"] != SIXTEEN_BIT
    widths = [1 if quantized else trained_dtype(config.model).itemsize, made.dtype.itemsize]
    needed = SCORING_ROOM * made.size / made.dtype.itemsize * max(widths)
    free = free_bytes(pick_device(device))
    if needed > free:
        return f"the models take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    return None
