"""`evaluate`: a run against its base on held-out chats, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phinetune.api.held_out import chats_of, held_out_chats
from phinetune.api.report import write_page
from phinetune.api.sections import DataValue, holds_data, one_or_several
from phinetune.api.train import EXAMPLES
from phinetune.checkpoints.opened import open_model, opened_config, run_of
from phinetune.checkpoints.tokenizer import open_config
from phinetune.config.evaluation import EvaluationSection
from phinetune.config.judge import JudgeMetric
from phinetune.config.own_metrics import CustomMetric
from phinetune.config.run import make_config
from phinetune.data.read.held_data import hold_function
from phinetune.errors import DataError, ModelError, RunError
from phinetune.evaluation.compare import Comparison, compare
from phinetune.evaluation.harness import TaskResult, open_tasks, run_tasks
from phinetune.evaluation.judge import check_judges, judge_notices
from phinetune.evaluation.kept import neutral_sets, with_kept
from phinetune.evaluation.metrics import open_metrics
from phinetune.files import write_text
from phinetune.logs import quiet_libraries
from phinetune.run_folder import EVALUATION, RunFolder
from phinetune.run_lock import locked, refuse_if_locked
from phinetune.screen.comparison import show_comparison
from phinetune.screen.console import Console, say, stderr
from phinetune.screen.hard_rows import show_hard_rows
from phinetune.screen.harness_tasks import show_tasks
from phinetune.screen.kept import show_kept
from phinetune.screen.progress import ComparisonProgress
from phinetune.training.warm_start import STARTED_FROM, start_side

logger = logging.getLogger(__name__)


@holds_data
def evaluate(
    path: str | Path,
    data: DataValue = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    tag: str | None = None,
    row: Callable[..., Any] | None = None,
    out: str | Path | None = None,
    record: bool = True,
    console: Console | None = None,
    **model_options: Any,
) -> Comparison:
    """Compare a run (or an adapter folder) with its base on held-out chats; a model without an adapter stands alone.

    Args:
        path: a run, an adapter folder or a model.
        data: file of chats, several, or a data object (see `train`); None takes the run's own held-out chats: those of
            its final verdict, a file's, or the share of its training chats.
        evaluation: the section `evaluation`.
        tag: column of the data by whose values the results are split as well; None takes the run's `data.tag`.
        row: the function that makes a row of what the data holds, if the run was trained with one.
        out: write the results to this file as JSON, every answer included.
        record: keep the results in the run's folder as evaluation.json, and renew its report.
        console: where to print; standard error if left out.
        model_options: keys of the section `model` (`device`, `dtype`, …).

    Raises:
        PhinetuneError: the model or the data can't be used.
    """
    console = console or stderr()
    quiet_libraries()
    if record and RunFolder(Path(path).expanduser()).is_run:
        refuse_if_locked(Path(path).expanduser())
    config = opened_config(path, **model_options)
    open_config(config.model)  # a path without a model is told before all else
    options = _options(config.evaluation, evaluation or {}, console)
    check_judges(options)
    neutral_sets(options)  # what can't be had is told before anything slow begins
    metrics = open_metrics(options)
    if tag:
        config.data.tag = tag
    if row:
        config.data.row = hold_function(row)
    held_out = (
        chats_of(config, one_or_several(data, "data"))
        if data is not None
        else held_out_chats(config, Path(path).expanduser())
    )
    if held_out is None:
        raise ModelError(f"{path}: no held-out chats are recorded there; name a file with --data FILE")
    if tag and not any(held_out.tags):
        raise DataError(f"--tag {tag}: no row of {held_out.report.source} has a column of that name")
    for line in held_out.report.lines():
        say(console, line)
    opened = open_model(path, config)
    if opened.has_adapter:
        for line in judge_notices(options):
            say(console, line)
    elif options.judges:
        say(console, "Not used: the judge, since there is no tuned model to compare with its base")
    with ComparisonProgress(console) as watcher:
        tokenizer = opened.loaded.tokenizer
        run = run_of(Path(path).expanduser())
        start = start_side(opened.model, run.read_start().get(STARTED_FROM)) if run else None
        began, base = time.perf_counter(), opened.base_side
        comparison = compare(opened.model, tokenizer, opened.encoder, held_out, options, metrics, watcher, base, start)
        comparison = with_kept(comparison, opened.model, tokenizer, held_out, options, base, began)
    show_comparison(comparison, console)
    show_hard_rows(comparison.hard, console)
    show_kept(comparison.kept, console)
    _write_json(out, comparison.to_tree(), console)
    if record:
        _record(path, comparison, console)
    return comparison


def _write_json(out: str | Path | None, tree: Any, console: Console) -> None:
    if out:
        write_text(Path(out), json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        say(console, f"Wrote {out}")


def _record(path: str | Path, comparison: Comparison, console: Console) -> None:
    """Keep a comparison made after the run in its folder, if `path` is a run, and renew its report."""
    folder = RunFolder(Path(path).expanduser())
    if not folder.is_run:
        return
    try:
        data = {"held_out": comparison.data, "overlap": comparison.overlap}
        with locked(folder.path):
            folder.write_evaluation({"data": data, **comparison.to_tree(examples=EXAMPLES)})
            page = write_page(folder)
    except (OSError, RunError) as error:
        logger.warning("%s: the evaluation was not kept there: %s", folder.path, error)
        return
    say(console, f"Wrote {folder.path / EVALUATION}{f' and {page}' if page else ''}")


def _options(recorded: EvaluationSection, given: Mapping[str, Any], console: Console) -> EvaluationSection:
    """The run's own section with what is given now on top. Functions and judges that only the run names are not
    called: a run may be anyone's.
    """
    calling: list[CustomMetric | JudgeMetric] = [
        *(one for one in recorded.own if one.called is not None),
        *recorded.judges,
    ]
    kept = [one for one in recorded.metrics if one not in calling]
    if calling and "metrics" not in given:
        names = ", ".join(one.name for one in calling)
        say(
            console,
            f"Left out: {names}. A function or a judge that a run's config.yaml names is called only if you name it "
            "yourself, with --metrics",
        )
    tree = {**recorded.model_dump(), "metrics": kept, **given}
    return make_config({"evaluation": tree}, where="evaluate").evaluation


def evaluate_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    out: str | Path | None = None,
    console: Console | None = None,
    **model_options: Any,
) -> list[TaskResult]:
    """Run tasks of lm-evaluation-harness on a run and on its base; a model without an adapter stands alone.

    Args:
        path: a run, an adapter folder or a model.
        tasks, include_path, limit, batch_size, chat_template: see `phinetune.evaluation.harness.run_tasks`.
        out, console, model_options: see `evaluate`.

    Raises:
        PhinetuneError: the model, the harness or a task can't be had.
    """
    console = console or stderr()
    config = opened_config(path, **model_options)
    open_config(config.model)
    manager = open_tasks(tasks, include_path)
    opened = open_model(path, config)
    results = run_tasks(
        opened.model,
        opened.loaded.tokenizer,
        tasks,
        manager,
        limit=limit,
        batch_size=batch_size,
        chat_template=chat_template,
        base=opened.base_side,
        on_side=lambda side: say(console, f"Running {', '.join(tasks)} on {side} …"),
    )
    show_tasks(results, console)
    _write_json(out, {"tasks": [result.to_dict() for result in results]}, console)
    return results
