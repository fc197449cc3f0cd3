"""`export`: a run in other programs' forms, and what each form loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phinetune.api.held_out import held_out_chats
from phinetune.checkpoints.opened import open_model, opened_config
from phinetune.config.run import RunConfig
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.errors import ModelError
from phinetune.evaluation.answering import questions_of
from phinetune.evaluation.preferences import are_pairs
from phinetune.exporting import targets
from phinetune.exporting.measuring.losses import ROWS, Measured, measure_file, measure_run
from phinetune.exporting.output_paths import ExportResult
from phinetune.logs import quiet_libraries
from phinetune.screen.console import Console, say, silent
from phinetune.screen.exports import MeasuringProgress, show_measured

WHOLE_MODELS = ("gguf", "ollama", "onnx")  # what a program can answer with by itself


def export(
    run: str | Path,
    to: str,
    *,
    kind: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a run, an adapter folder or a model in another program's form. It appears whole or not at all.

    Args:
        run: what to export, as on the command line.
        to: gguf, gguf-lora, ollama or onnx.
        kind: the type of the numbers; the target's first type if left out.
        out: the place to write to; if left out, a place in the current folder that is named after the run.
        overwrite: replace an earlier export there.

    Raises:
        ModelError: the target or the type is unknown, the place is taken, or the model can't be written in this form.
    """
    return targets.export(str(run), to, kind=kind, out=out, overwrite=overwrite)


def export_types(
    run: str | Path,
    to: str,
    kinds: Sequence[str | None],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    measure: bool = False,
    console: Console | None = None,
) -> tuple[list[ExportResult], list[Measured]]:
    """Write a run in several types, and measure each file on the run's held-out chats if `measure` says so.

    Args:
        kinds: the types; None is the target's first.
        out: the place of the only type.
        measure: run each file in its program: its held-out loss and its answers beside the run's own.
        console: where to print what was measured; nowhere if left out.

    Returns:
        the exports, and what was measured: the run first, then each file.

    Raises:
        PhinetuneError: as `export`; several types and one place; no held-out chats; the file's program is missing.
    """
    for kind in kinds:
        targets.check_kind(to, kind)
    if len(kinds) > 1 and (out is not None or "{type}" not in targets.TARGETS[to].place):
        said = "--out names one place" if out is not None else f"--to {to} writes one place"
        raise ModelError(f"{said}, and {len(kinds)} types are to be written; write them one by one")
    ready = _held_out(run, to) if measure else None  # what can't be measured is told before anything is written
    done = [export(run, to, kind=kind, out=out, overwrite=overwrite) for kind in kinds]
    return done, _measure(run, *ready, [one.path for one in done], console or silent()) if ready else []


def measure_exports(run: str | Path, files: Sequence[Path], console: Console | None = None) -> list[Measured]:
    """Run files that were made of a run in their programs, on the run's held-out chats.

    Args:
        files: GGUF files, folders for Ollama, ONNX folders.

    Returns:
        the run's own numbers first, then those of each file.

    Raises:
        PhinetuneError: no held-out chats, or a file's program is missing.
    """
    return _measure(run, *_held_out(run, "gguf"), files, console or silent())


def _held_out(run: str | Path, to: str) -> tuple[RunConfig, ChatSet]:
    """What to measure on.

    Raises:
        PhinetuneError: there is nothing that can be measured.
    """
    if to not in WHOLE_MODELS:
        raise ModelError(f"--measure runs a whole model, and --to {to} writes a part of one")
    quiet_libraries()
    config = opened_config(run)
    held_out = held_out_chats(config, Path(run).expanduser())
    if held_out is None:
        raise ModelError(f"{run}: no held-out chats are recorded there, so --measure has nothing to measure on")
    if are_pairs(held_out.encoded):
        raise ModelError(f"{run}: its held-out rows are pairs of answers, and --measure needs chats with one answer")
    return config, held_out


def _measure(
    run: str | Path, config: RunConfig, held_out: ChatSet, files: Sequence[Path], console: Console
) -> list[Measured]:
    opened = open_model(run, config)
    rows = list(held_out.encoded[:ROWS])
    prompts = [question.ids for question in questions_of(opened.encoder, held_out, ROWS)]
    say(console, f"Measuring on {len(rows)} held-out rows, with answers to {len(prompts)} prompts …")
    own, answers = measure_run(opened.model, opened.loaded.tokenizer, rows, prompts)
    del opened  # each file's program brings the model once more
    measured = [own]
    for file in files:
        with MeasuringProgress(console, file.name, len(rows) + len(prompts)) as progress:
            measured.append(measure_file(file, rows, prompts, answers, progress.advance))
    show_measured(measured, console)
    return measured
