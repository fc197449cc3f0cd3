"""The library: `train`, `evaluate` and `load`, the same work as the command line's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console

from phinetune.config import EvaluationSection, RunConfig, make_config
from phinetune.data.build import build_set, check_sources, read_all
from phinetune.errors import ConfigError, ModelError
from phinetune.evaluation.compare import Comparison, compare, show_comparison
from phinetune.export.card import write_card
from phinetune.files import write_text
from phinetune.logs import LEVELS, quiet_libraries, set_up_logging
from phinetune.run_folder import CARD, RunFolder
from phinetune.training import job
from phinetune.training.settings import read_settings
from phinetune.tuned import open_model


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
    trained = job.train(config, console, resume=resume, overwrite=overwrite)
    reports = {"train": trained.chats.train, "held_out": trained.chats.held_out}
    results: dict[str, Any] = {
        "base": asdict(trained.loaded.base),
        "data": {name: made.report.to_dict() if made else None for name, made in reports.items()},
        "training": trained.summary,
    }
    if trained.stopped:
        return Run(trained.folder.path, results, True)
    if trained.chats.held_out and config.evaluation.enabled:
        comparison = compare(
            trained.model,
            trained.loaded.tokenizer,
            trained.encoder,
            trained.chats.held_out,
            config.evaluation,
            console,
        )
        results["evaluation"] = comparison.to_dict()
        results["examples"] = [asdict(example) for example in comparison.examples[:10]]
        show_comparison(comparison, console)
    _finish(trained.folder, config, results, trained.model)
    return Run(trained.folder.path, results, False)


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
    folder.write_results(results)  # last: its presence says that the run has ended


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
    console: Console | None = None,
    **model_options: Any,
) -> Comparison:
    """Compare a run (or an adapter folder) with its base on held-out chats; a plain model is measured alone.

    Args:
        path: a run, an adapter folder or a model.
        data: file of chats; None takes the run's own held-out file.
        evaluation: the section `evaluation`.

    Raises:
        PhinetuneError: the model or the data can't be used.
    """
    console = console or Console(stderr=True)
    tuned = open_model(path, **model_options)
    source = data or tuned.config.data.eval
    if source is None or isinstance(source, float):
        raise ModelError(f"{path}: no held-out file is recorded there; name one with --data FILE")
    section = tuned.config.data.model_copy(update={"train": source, "eval": None, "limit": None})
    check_sources(section)
    limit = read_settings(tuned.config.peft_config, tuned.config.training_config).max_length
    name = source if isinstance(source, str) else ", ".join(source)
    held_out = build_set(name, read_all(source, section.split), section, tuned.encoder, limit)
    options = EvaluationSection.model_validate({**tuned.config.evaluation.model_dump(), **(evaluation or {})})
    comparison = compare(tuned.model, tuned.loaded.tokenizer, tuned.encoder, held_out, options, console)
    show_comparison(comparison, console)
    return comparison
