"""`train` and `demo`: a run is prepared, trained, compared with its base, and leaves its card and its report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from phinetune import processes
from phinetune.api.before import look_at_rows, look_at_settings
from phinetune.api.race import Raced, race, race_folder
from phinetune.api.report import write_page
from phinetune.api.sections import DataValue, SectionValue, holds_data, make_sections
from phinetune.checkpoints.device import pick_device
from phinetune.checkpoints.untouched import untouched_base
from phinetune.config.run import RunConfig
from phinetune.demo_data.demo_config import demo_config
from phinetune.durations import read_seconds
from phinetune.errors import ConfigError, ModelError
from phinetune.evaluation.compare import compare
from phinetune.evaluation.judge import judge_notices
from phinetune.evaluation.kept import with_kept
from phinetune.evaluation.metrics import Metrics
from phinetune.evaluation.while_training import while_training
from phinetune.exporting.hub.card import write_card
from phinetune.exporting.hub.push import push
from phinetune.files import write_text
from phinetune.logs import LEVELS, quiet_libraries, set_up_logging
from phinetune.planning.limits import check_limits
from phinetune.run_folder import CARD, RunFolder
from phinetune.run_lock import locked
from phinetune.screen.adapted_layers import show_targets
from phinetune.screen.comparison import show_comparison
from phinetune.screen.console import Console, say, silent, stderr
from phinetune.screen.curves import show_curves
from phinetune.screen.data import show_data
from phinetune.screen.demo_gain import show_gain
from phinetune.screen.hard_rows import show_hard_rows
from phinetune.screen.kept import show_kept
from phinetune.screen.progress import ComparisonProgress, ProgressLine, ReferenceProgress
from phinetune.screen.settings import show_settings
from phinetune.training.best_checkpoint import needs_answers
from phinetune.training.callbacks import StopRequest
from phinetune.training.curve_words import Words, curve_words, read_course
from phinetune.training.given_callbacks import Callback, made_callbacks
from phinetune.training.hub_wish import HubWish
from phinetune.training.library_errors import disk_told
from phinetune.training.prepare import PreparedRun, SettledRun, as_it_began, prepare_run, settle
from phinetune.training.race_field import Wish
from phinetune.training.run import RunPlace, TrainedRun, open_place, train_run
from phinetune.training.warm_start import STARTED_FROM, start_side

EXAMPLES = 20  # answered prompts that results.json keeps


@dataclass(frozen=True)
class Run:
    """A run as `train` leaves it.

    Attributes:
        path: its folder, an adapter that PEFT loads.
        results: what results.json holds; `evaluation` only where there were held-out or test chats.
        stopped: whether it was asked to stop before its end; `resume=True` goes on.
    """

    path: Path
    results: dict[str, Any]
    stopped: bool


@holds_data
def train(
    model: SectionValue = None,
    data: DataValue = None,
    peft_config: Mapping[str, Any] | None = None,
    training_config: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    objective: SectionValue = None,
    engine: SectionValue = None,
    resume: bool = False,
    overwrite: bool = False,
    changed: bool = False,
    max_time: float | str | None = None,
    callbacks: Sequence[Callback] | None = None,
    console: Console | None = None,
) -> Run:
    """Fine-tune a Phi-3 on chats, compare it with its base, and leave a run in `training_config["output_dir"]`.

    Args:
        model: hub id, folder, `starter`, or the section `model` as a dictionary.
        data: file of chats, or a list of them; a `Dataset`, `DatasetDict` or `IterableDataset`, a pandas or polars
            frame, a list or an iterator of dicts; or the section `data` as a dictionary (`train`, `eval`, …) that has
            any of these, and a function as its `row`.
        peft_config: keys of `peft.LoraConfig`.
        training_config: keys of `trl.SFTConfig`.
        evaluation, objective, engine: these sections.
        resume: go on with the run in output_dir from its newest checkpoint. Data in memory is given again, and is
            held against what the run recorded of it.
        overwrite: replace the run in output_dir.
        changed: with `resume`, go on although something that decides the result has changed; it is recorded.
        max_time: stop with a checkpoint before so much time is over, counted from this call: seconds, or a text such
            as `2h30m`.
        callbacks: transformers' `TrainerCallback`s, told of each step, log, evaluation and checkpoint. One that sets
            `control.should_training_stop` ends the run; what it has learnt by then is compared with its base. Of
            several processes each calls its own, and all must decide alike. With a race they see the steps after it.
        console: where to print; standard error if left out.

    Raises:
        PhinetuneError: anything a user can mend, said in one sentence each.
    """
    config = make_sections(
        model=model,
        data=data,
        peft_config=peft_config,
        training_config=training_config,
        evaluation=evaluation,
        objective=objective,
        engine=engine,
    )
    return train_config(
        config,
        console or stderr(),
        resume=resume,
        overwrite=overwrite,
        changed=changed,
        max_time=max_time,
        callbacks=made_callbacks(callbacks),
    )


def demo(
    output_dir: str | Path = "runs/demo",
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Run:
    """Fine-tune the starter model on the bundled chats of an outdoor-gear shop.

    Args:
        overrides: `section.key=value` each, as `--set` takes them.
        resume, overwrite, console: see `train`.

    Raises:
        PhinetuneError: see `train`.
    """
    console = console or stderr()
    run = train_config(demo_config(Path(output_dir), overrides), console, resume=resume, overwrite=overwrite)
    if not run.stopped:
        show_gain(run.results, console)
    return run


def train_config(
    config: RunConfig,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    changed: bool = False,
    max_time: float | str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Console | None = None,
    on_trained: Callable[[TrainedRun], None] = lambda trained: None,
) -> Run:
    """`train` for a validated configuration. Of several processes the main one prints to `console` and writes.

    Args:
        callbacks: see `train`.
        progress: where the steps are shown; `console` if left out.
        on_trained: is given a run that was trained to its end, with its model, before its results are written.
    """
    stop = StopRequest(_seconds(max_time))
    set_up_logging(_log_level(config))
    quiet_libraries()
    settled = settle(config)
    metrics = look_at_settings(settled)
    console = _join_others(settled, console)
    raced = _raced(settled, console, stop, resume=resume, overwrite=overwrite)
    if isinstance(raced, Run):
        return raced
    if raced:
        resume, overwrite = raced.has_begun, not raced.has_begun
    with locked(config.output_dir) if processes.is_main() else nullcontext():
        with processes.main_first():  # the others look at a folder that is tidy
            place = open_place(config, resume=resume, overwrite=overwrite, changed=changed)
        try:
            told = Told(progress or console, callbacks, on_trained)
            return _train_at(place, settled, metrics, console, stop, raced, told)
        except BaseException:
            if processes.is_main():
                with suppress(OSError):
                    place.folder.tidy()  # a run that was to be replaced is seen again
            raise


def _raced(
    settled: SettledRun, console: Console, stop: StopRequest, *, resume: bool, overwrite: bool
) -> Raced | Run | None:
    """The winner of the race that the settings ask for; a stopped run if it was stopped; None if there is none to run.

    A run that goes on after its race has what the race decided.
    """
    if not settled.settings.race:
        return None
    folder = RunFolder(settled.config.output_dir)
    if resume and (folder.is_finished or not race_folder(folder.path).is_dir()):
        return None
    return stopped_or(race(settled, Wish(), console, stop, resume=resume, overwrite=overwrite))


def stopped_or(raced: Raced) -> Raced | Run:
    """A race that was stopped as a run that was stopped."""
    if not raced.stopped:
        return raced
    return Run(raced.folder, {"training": {"steps": raced.steps}}, True)


def finish_raced(raced: Raced, settled: SettledRun, console: Console, stop: StopRequest) -> Run:
    """The rest of the winner's run, from the step where the race ended."""
    metrics = look_at_settings(settled)
    with locked(settled.config.output_dir):
        place = open_place(settled.config, resume=raced.has_begun, overwrite=not raced.has_begun)
        return _train_at(place, settled, metrics, console, stop, raced)


@dataclass(frozen=True)
class Told:
    """Who is told how a run goes.

    Attributes:
        steps_on: where the steps are shown.
        callbacks, on_trained: see `train_config`.
    """

    steps_on: Console
    callbacks: Sequence[TrainerCallback] = ()
    on_trained: Callable[[TrainedRun], None] = lambda trained: None


def _train_at(
    place: RunPlace,
    settled: SettledRun,
    metrics: Metrics,
    console: Console,
    stop: StopRequest,
    raced: Raced | None = None,
    told: Told | None = None,
) -> Run:
    """All of a run that happens while its folder is locked."""
    prepared = raced.prepared() if raced else prepare_run(*_begun(place, settled))
    look_at_rows(prepared, metrics)
    check_limits(prepared)
    if not raced:  # it has shown them
        show_data(prepared.chats, prepared.tokenizer, console)
        show_settings(prepared.choices, console)
        _show_judges(prepared, console)
    told = told or Told(console)
    progress, reference = ProgressLine(told.steps_on), ReferenceProgress(console)
    try:
        trained = train_run(
            prepared,
            place,
            look=_look(prepared, metrics),
            callbacks=[progress, *told.callbacks],
            on_start=lambda model: show_targets(model, console),
            on_reference=reference,
            stop=stop,
            loaded=raced.base.take(prepared) if raced else None,
        )
    finally:
        progress.close()
        reference.close()
    if not trained.stopped:
        told.on_trained(trained)
    with disk_told(place.folder.path):
        run = _finish(trained, metrics, console)
    if settled.settings.push and processes.is_main() and not run.stopped:
        _push(run.path, settled.settings.push, console)
    return run


def _show_judges(prepared: PreparedRun, console: Console) -> None:
    """What will go to judges after training, and where."""
    section, measured = prepared.config.evaluation, prepared.chats.measured
    if section.judges and not (measured and section.enabled):
        names = ", ".join(judge.name for judge in section.judges)
        why = "evaluation.enabled is false" if measured else "there are no held-out chats"
        say(console, f"Not used: {names}, since {why}")
        return
    for line in judge_notices(section):
        say(console, line)


def _begun(place: RunPlace, settled: SettledRun) -> tuple[SettledRun, Mapping[str, Any]]:
    """The run as it is to be prepared, and what it chose when it began, if it goes on."""
    return as_it_began(settled, place.folder.read_start()) if place.checkpoint else (settled, {})


def _seconds(max_time: float | str | None) -> float | None:
    """`max_time` in seconds.

    Raises:
        ConfigError: it is no duration.
    """
    if max_time is None:
        return None
    try:
        return read_seconds(max_time if isinstance(max_time, str) else f"{max_time:f}s")
    except ValueError as error:
        raise ConfigError(f"max_time (--max-time): {error}") from None


def _push(folder: Path, wish: HubWish, console: Console) -> None:
    """Push a finished run as its settings ask; where that fails, the run is whole all the same."""
    try:
        done = push(folder, wish.repo, private=wish.private, token=wish.token)
    except ModelError as error:
        again = f"phinetune push {folder} {wish.repo}" + ("" if wish.private else " --public")
        whole = f"the run in {folder} is finished and whole, and only its push failed; push it with `{again}`"
        raise ModelError([*error.problems, whole]) from error
    say(console, done.report())


def _join_others(settled: SettledRun, console: Console) -> Console:
    """Meet the other processes of the run. Every process but the main one gets a silent console."""
    config, settings = settled.config, settled.settings
    cpu = pick_device(config.model.device).type == "cpu" or bool(settings.training.get("use_cpu"))
    processes.join(cpu=cpu, timeout_s=settings.step_timeout)
    if processes.is_main():
        return console
    logging.getLogger("phinetune").setLevel(logging.ERROR)
    return silent()


def _log_level(config: RunConfig) -> str:
    level = str(config.training_config.get("log_level") or "passive").lower()
    if level == "passive":  # transformers' word for "leave it as it is"
        return "info"
    if level not in LEVELS:
        raise ConfigError(f"training_config.log_level: `{level}` is none of {', '.join(LEVELS)}, passive")
    return level


def _look(prepared: PreparedRun, metrics: Metrics) -> Any:
    """What looks at the model at every evaluation."""
    section = prepared.config.evaluation
    counted = needs_answers(prepared.settings, section, prepared.objective)
    held_out, encoder = prepared.chats.held_out, prepared.rows.encoder
    return while_training(prepared.tokenizer, encoder, held_out, section, metrics, counted)


def _finish(trained: TrainedRun, metrics: Metrics, console: Console) -> Run:
    """The comparison, which all processes make; and the card, the results and the report, which the main one writes."""
    folder = trained.folder
    results: dict[str, Any] = {
        "base": asdict(trained.loaded.base),
        "data": trained.prepared.chats.facts(),
        "training": trained.summary,
    }
    if trained.stopped:
        if processes.is_main():
            write_page(folder)
        processes.from_main({})  # a launcher ends all processes when one has ended with the status of a stopped run
        return Run(folder.path, results, True)
    results |= _compared(trained, metrics, console)  # by all processes
    if processes.is_main():
        results["curves"] = [asdict(words) for words in _said(trained)]
        show_curves(results["curves"], console)
        _write_results(folder, trained, results)
    return Run(folder.path, processes.from_main(results), False)


def _said(trained: TrainedRun) -> list[Words]:
    """What the curves of a finished run say."""
    prepared, best = trained.prepared, trained.summary["best"]
    course = read_course(
        trained.folder.metrics,
        trained.folder.spikes,
        rows=None if prepared.config.data.streaming else prepared.chats.train.report.kept,
        best_kept=best["step"] if best and best["loaded"] else None,
        likelihood=prepared.objective.likelihood,
    )
    return curve_words(course)


def _compared(trained: TrainedRun, metrics: Metrics, console: Console) -> dict[str, Any]:
    """Base against tuned, shown and as results.json holds it; empty without held-out or test chats."""
    prepared = trained.prepared
    measured, section = prepared.chats.measured, prepared.config.evaluation
    if not (measured and section.enabled):
        return {}
    tokenizer, encoder = trained.loaded.tokenizer, prepared.rows.encoder
    with ComparisonProgress(console) as watcher:
        base = partial(untouched_base, trained.model, trained.loaded, prepared.config.model)
        start = start_side(trained.model, trained.folder.read_start().get(STARTED_FROM))
        began = time.perf_counter()
        comparison = compare(trained.model, tokenizer, encoder, measured, section, metrics, watcher, base, start)
        comparison = with_kept(comparison, trained.model, tokenizer, measured, section, base, began)
    show_comparison(comparison, console, "Test chats" if prepared.chats.test else "Held-out chats")
    show_hard_rows(comparison.hard, console)
    show_kept(comparison.kept, console)
    return comparison.to_tree(examples=EXAMPLES)


def _write_results(folder: RunFolder, trained: TrainedRun, results: dict[str, Any]) -> None:
    lora = trained.model.peft_config["default"].to_dict()
    write_text(folder.path / CARD, write_card(trained.prepared.config, results, lora))
    folder.write_results(results)  # after all else: its presence says that the run has ended
    write_page(folder)
