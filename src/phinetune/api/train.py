"""The library: `train`, `evaluate`, `merge`, `push` and `load`, the same work as the command line's."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table

from phinetune import processes
from phinetune.chat.encoder import ChatEncoder
from phinetune.checkpoints.device import pick_device
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.checkpoints.opened import Tuned, open_model, recorded_config
from phinetune.config.run import CustomMetric, EvaluationSection, RunConfig, make_config
from phinetune.data.prepare.build import Chats, ChatSet, build_chats, check_sources, read_sets
from phinetune.engine.memory import free_bytes
from phinetune.engine.scoring import Score
from phinetune.errors import ConfigError, DataError, ModelError
from phinetune.evaluation.compare import Comparison, compare
from phinetune.evaluation.harness import TaskResult, run_tasks, show_tasks
from phinetune.evaluation.metrics import row_metrics
from phinetune.evaluation.scoring import score_rows
from phinetune.evaluation.while_training import WhileTraining, while_training
from phinetune.export.base import trained_dtype
from phinetune.export.hub.card import write_card
from phinetune.export.hub.push import Push, push_run
from phinetune.export.merge.merge import Merge, merge_run, record_losses
from phinetune.files import write_text
from phinetune.logs import LEVELS, quiet_libraries, set_up_logging
from phinetune.report.page import write_report
from phinetune.run_folder import CARD, REPORT, RunFolder
from phinetune.screen.comparison import show_comparison
from phinetune.training import run as job
from phinetune.training.settings import read_settings

logger = logging.getLogger(__name__)

EXAMPLES = 20  # answered prompts that results.json keeps
SCORING_ROOM = 1.2  # memory that a model takes while it scores, as a multiple of its weights


@dataclass(frozen=True)
class Run:
    """A run as `train` leaves it.

    Attributes:
        path: its folder, an adapter that PEFT loads.
        results: what results.json holds; `evaluation` only where there were held-out chats.
        stopped: whether it was asked to stop before its end; `resume=True` goes on.
    """

    path: Path
    results: dict[str, Any]
    stopped: bool


def train(
    model: str | Mapping[str, Any] | None = None,
    data: str | Mapping[str, Any] | None = None,
    peft_config: Mapping[str, Any] | None = None,
    training_config: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Fine-tune a Phi-3 on chats, compare it with its base, and leave a run in `training_config["output_dir"]`.

    Args:
        model: hub id, folder, `starter`, or the section `model` as a dictionary.
        data: file of chats, or the section `data` as a dictionary (`train`, `eval`, …).
        peft_config: keys of `peft.LoraConfig`.
        training_config: keys of `trl.SFTConfig`.
        evaluation: the section `evaluation`.
        resume: go on with the run in output_dir from its newest checkpoint.
        overwrite: replace the run in output_dir.

    Raises:
        PhinetuneError: anything a user can mend, said in one sentence each.
    """
    sections = {
        "model": model,
        "data": data,
        "peft_config": peft_config,
        "training_config": training_config,
        "evaluation": evaluation,
    }
    config = make_config({key: section for key, section in sections.items() if section is not None})
    return run(config, Console(stderr=True), resume=resume, overwrite=overwrite)


def run(config: RunConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> Run:
    """`train` for a validated configuration, shown on `console`."""
    set_up_logging(_log_level(config))
    quiet_libraries()
    row_metrics(config.evaluation)  # functions that can't be had are told before anything slow begins
    section = config.evaluation

    def looking(loaded: Loaded, encoder: ChatEncoder, chats: Chats, counted: bool) -> WhileTraining:
        return while_training(loaded.tokenizer, encoder, chats.held_out, section, counted)

    trained = job.train(config, console, resume=resume, overwrite=overwrite, looking=looking)
    results: dict[str, Any] = {
        "base": asdict(trained.loaded.base),
        "data": trained.chats.facts(),
        "training": trained.summary,
    }
    if trained.stopped:
        if processes.is_main():
            write_page(trained.folder)
        return Run(trained.folder.path, results, True)
    if processes.is_main():
        results |= _compared(trained, config, console)
        _finish(trained.folder, config, results, trained.model)
    return Run(trained.folder.path, processes.from_main(results), False)


def _compared(trained: job.Trained, config: RunConfig, console: Console) -> dict[str, Any]:
    """Base against tuned, shown and as results.json holds it; empty without held-out chats."""
    if not (trained.chats.held_out and config.evaluation.enabled):
        return {}
    tokenizer, held_out = trained.loaded.tokenizer, trained.chats.held_out
    comparison = compare(trained.model, tokenizer, trained.encoder, held_out, config.evaluation, console)
    show_comparison(comparison, console)
    return comparison.to_tree(examples=EXAMPLES)


def _log_level(config: RunConfig) -> str:
    level = str(config.training_config.get("log_level") or "passive").lower()
    if level == "passive":  # transformers' word for "leave it as it is"
        return "info"
    if level not in LEVELS:
        raise ConfigError(f"training_config.log_level: `{level}` is none of {', '.join(LEVELS)}, passive")
    return level


def _finish(folder: RunFolder, config: RunConfig, results: dict[str, Any], model: PeftModel) -> None:
    lora = model.peft_config["default"].to_dict()
    write_text(folder.path / CARD, write_card(config, results, lora))
    folder.write_results(results)  # after all else: its presence says that the run has ended
    write_page(folder)


def write_page(folder: RunFolder) -> Path | None:
    """Write report.html; whatever goes wrong there is said in a line, since a run must not be lost over its page."""
    try:
        return write_report(folder.path)
    except Exception as error:
        logger.warning("%s was not written: %s; `phinetune report %s` tries again", REPORT, error, folder.path)
        return None


def record_evaluation(path: str | Path, comparison: Comparison) -> Path | None:
    """Keep a comparison made after the run in its folder, and renew its report.

    Returns:
        The report; None where `path` is no run, or nothing could be written there.
    """
    folder = RunFolder(Path(path).expanduser())
    if not folder.is_run:
        return None
    try:
        folder.write_evaluation({"data": {"held_out": comparison.data}, **comparison.to_tree(examples=EXAMPLES)})
    except OSError as error:
        logger.warning("%s: the evaluation was not kept there: %s", folder.path, error)
        return None
    return write_page(folder)


def load(path: str | Path, **model_options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a run, an adapter folder or a model: transformers' and PEFT's own objects.

    Raises:
        ModelError: see `open_model`.
    """
    tuned = open_model(path, **model_options)
    return tuned.model, tuned.loaded.tokenizer


def evaluate(
    path: str | Path,
    data: str | Sequence[str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    tag: str | None = None,
    console: Console | None = None,
    **model_options: Any,
) -> Comparison:
    """Compare a run (or an adapter folder) with its base on held-out chats; a plain model is measured alone.

    Args:
        path: a run, an adapter folder or a model.
        data: file of chats; None takes the run's own held-out file.
        evaluation: the section `evaluation`.
        tag: column of the data by whose values the results are split as well; None takes the run's `data.tag`.

    Raises:
        PhinetuneError: the model or the data can't be used.
    """
    console = console or Console(stderr=True)
    tuned = open_model(path, **model_options)
    options = _evaluation_options(tuned.config.evaluation, evaluation or {}, console)
    source = data or tuned.config.data.eval
    if source is None or isinstance(source, float):
        raise ModelError(f"{path}: no held-out file is recorded there; name one with --data FILE")
    if tag:
        tuned.config.data.tag = tag
    held_out = _chats_of(tuned, source)
    if tag and not any(held_out.tags):
        raise DataError(f"--tag {tag}: no row of {held_out.report.source} has a column of that name")
    comparison = compare(tuned.model, tuned.loaded.tokenizer, tuned.encoder, held_out, options, console)
    show_comparison(comparison, console)
    return comparison


def evaluate_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    console: Console | None = None,
    **model_options: Any,
) -> list[TaskResult]:
    """Run tasks of lm-evaluation-harness on a run and on its base; a plain model is measured alone.

    Args:
        path: a run, an adapter folder or a model.
        tasks, include_path, limit, batch_size, chat_template: see `phinetune.evaluation.harness.run_tasks`.

    Raises:
        PhinetuneError: the model, the harness or a task can't be had.
    """
    console = console or Console(stderr=True)
    tuned = open_model(path, **model_options)
    results = run_tasks(
        tuned.model,
        tuned.loaded.tokenizer,
        tasks,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        chat_template=chat_template,
        console=console,
    )
    show_tasks(results, console)
    return results


def _evaluation_options(recorded: EvaluationSection, given: Mapping[str, Any], console: Console) -> EvaluationSection:
    """The run's own section with what is given now on top. Functions that only the run names are not called: a run
    may be anyone's.
    """
    kept = [one for one in recorded.metrics if not isinstance(one, CustomMetric) or one.function is None]
    if len(kept) < len(recorded.metrics) and "metrics" not in given:
        names = ", ".join(one.name for one in recorded.metrics if one not in kept and isinstance(one, CustomMetric))
        console.print(
            f"Left out: {names}. A function that a run's config.yaml names is called only if you name it yourself, "
            "with --metrics",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    tree = {**recorded.model_dump(), "metrics": kept, **given}
    options = make_config({"evaluation": tree}, where="evaluate").evaluation
    row_metrics(options)  # functions that can't be had are told before anything slow begins
    return options


def _chats_of(tuned: Tuned, source: str | Sequence[str]) -> ChatSet:
    """The chats of a file, or of several, encoded as the run's own were."""
    listed = source if isinstance(source, str) else list(source)
    section = tuned.config.data.model_copy(update={"train": listed, "eval": None, "limit": None})
    check_sources(section)
    name = source if isinstance(source, str) else ", ".join(source)
    return read_sets(name, listed, section, tuned.encoder, _max_length(tuned.config))[0]


def _max_length(config: RunConfig) -> int | None:
    return read_settings(config.peft_config, config.training_config).max_length


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
    """Merge a run (or an adapter folder) into its base and write a plain transformers checkpoint.

    Args:
        path: a run, one of its checkpoints or an adapter folder.
        out: a folder that is not there yet, or empty.
        dtype: float32, bfloat16 or float16; None keeps the dtype of the base's files.
        base: `16bit`, or for a run trained with `model.quantization` `quantized`: merge into what is left of the
            base's weights after that.
        score: measure base, adapter and merged model on the run's held-out chats, where it has any.
        device: where they are measured.

    Raises:
        PhinetuneError: `out` is taken, or the run can't be merged.
    """
    console = console or Console(stderr=True)
    made = merge_run(path, out, dtype=dtype, base=base)
    console.print("\n".join(made.report()), markup=False, highlight=False, soft_wrap=True)
    if not score:
        return made
    try:
        scores = _score_merge(Path(path).expanduser(), made, console, device)
    except DataError as error:
        console.print(f"Held-out loss not measured: {error}", markup=False, highlight=False, soft_wrap=True)
        return made
    if scores:
        record_losses(made, {side: one.loss for side, one in scores.items()})
        console.print(_losses_table(scores))
    return made


def _score_merge(path: Path, made: Merge, console: Console, device: str) -> dict[str, Score]:
    """The scores of `base`, `adapter` and `merged`, one model in memory at a time; none where that can't be had."""
    config = recorded_config(path)
    reason = _why_not_scored(config, made, device)
    if reason:
        console.print(f"Held-out loss not measured: {reason}", markup=False, highlight=False, soft_wrap=True)
        return {}
    tuned = open_model(path, device=device)
    rows, batch = _held_out(tuned).encoded, config.evaluation.batch_size

    def scored(model: Any) -> Score:
        return sum(score_rows(model, rows, None if batch == "auto" else batch), Score())

    console.print(f"Scoring {len(rows)} held-out chats with base, adapter and merged model …", highlight=False)
    with tuned.model.disable_adapter():
        scores = {"base": scored(tuned.model)}
    scores["adapter"] = scored(tuned.model)
    del tuned
    gc.collect()  # a PEFT model is held by cycles
    written = {"path": str(made.path), "dtype": made.record["dtype"], "device": device}
    plain = {"revision": None, "tokenizer": None, "quantization": "none"}
    merged = load_base(config.model.model_copy(update=written | plain), fast=config.engine.kind == "fast")
    scores["merged"] = scored(merged.model)
    return scores


def _why_not_scored(config: RunConfig, made: Merge, device: str) -> str | None:
    if config.data.eval is None:
        return "no held-out chats are recorded for this run"
    quantized = config.model.quantization != "none"
    widths = [1 if quantized else trained_dtype(config.model).itemsize, made.dtype.itemsize]
    needed = SCORING_ROOM * made.size / made.dtype.itemsize * max(widths)
    free = free_bytes(pick_device(device))
    if needed > free:
        return f"the models take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    return None


def _held_out(tuned: Tuned) -> ChatSet:
    """The run's own held-out chats: a file's, or the share of its training chats."""
    data = tuned.config.data
    if not isinstance(data.eval, float):
        return _chats_of(tuned, data.eval or [])
    held_out = build_chats(data, tuned.encoder, _max_length(tuned.config)).held_out
    assert held_out
    return held_out


def _losses_table(scores: Mapping[str, Score]) -> Table:
    one = next(iter(scores.values()))
    table = Table(title=f"Held-out chats ({one.tokens:,} labelled tokens)", title_justify="left")
    for column in ("", *scores):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("loss", *(f"{one.loss:.4f}" for one in scores.values()))
    table.add_row("perplexity", *(f"{one.perplexity:.3f}" for one in scores.values()))
    table.add_row("token accuracy %", *(f"{100 * one.token_accuracy:.2f}" for one in scores.values()))
    return table


def push(path: str | Path, repo: str, *, private: bool = False, merged: bool = False) -> Push:
    """Push a run, one of its checkpoints or an adapter folder to the hub, with a model card, in one commit.

    Args:
        repo: `name` or `owner/name`; it is made where it is not there.
        private: make it private.
        merged: push base and adapter as one model instead of the adapter.

    Raises:
        PhinetuneError: nothing there to push, no access token, or what the hub refuses.
    """
    return push_run(path, repo, private=private, merged=merged)
