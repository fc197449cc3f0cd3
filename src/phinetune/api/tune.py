"""`tune`: candidates for learning rate, rank and epochs, of which the winner becomes the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phinetune import ray_cluster
from phinetune.api.race import race
from phinetune.api.sections import DataValue, SectionValue, holds_data, make_sections
from phinetune.api.train import Run, finish_raced, stopped_or
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError
from phinetune.logs import quiet_libraries, set_up_logging
from phinetune.screen.console import Console, stderr
from phinetune.training.callbacks import StopRequest
from phinetune.training.prepare import NO_HELD_OUT, settle
from phinetune.training.race_field import Wish
from phinetune.training.race_on_ray import check_travels


@holds_data
def tune(
    model: SectionValue = None,
    data: DataValue = None,
    peft_config: Mapping[str, Any] | None = None,
    training_config: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    objective: SectionValue = None,
    engine: SectionValue = None,
    trials: int | None = None,
    rates: Sequence[float] = (),
    ranks: Sequence[int] = (),
    epochs: Sequence[float] = (),
    study: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Run:
    """Try settings on the held-out rows, by successive halving, and keep the best as the run in output_dir.

    A tune that was stopped goes on with the same call. Where `RAY_ADDRESS` is set, its candidates train on that Ray
    cluster, as many at a time as have room; the winner is finished here.

    Args:
        model, data, peft_config, training_config, evaluation, objective, engine: see `train`.
        trials: how many learning rates; those beyond `rates` are looked for by optuna.
        rates: learning rates; the rule's (or the one given), half of it and twice it if left out.
        ranks: ranks to try besides, with the best rate.
        epochs: numbers of epochs to try besides, with the best rate and rank. Each trains to its end.
        study: a file (SQLite; a journal if it ends in .log) or the URL of a database, which several processes and
            machines may share. A file in the tune's folder if left out.
        overwrite: replace the run in output_dir, and what an earlier tune found.
        console: where to print; standard error if left out.

    Raises:
        PhinetuneError: anything a user can mend.
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
    wish = Wish(trials, tuple(rates), tuple(ranks), tuple(epochs))
    return tune_config(config, wish, console or stderr(), study=study, overwrite=overwrite)


def tune_config(
    config: RunConfig, wish: Wish, console: Console, *, study: str | None = None, overwrite: bool = False
) -> Run:
    """`tune` for a validated configuration."""
    set_up_logging()
    quiet_libraries()
    wish.check()
    if config.data.eval is None:
        raise ConfigError(f"tune: {NO_HELD_OUT}")
    on_ray = config if ray_cluster.address() else None
    if on_ray:
        ray_cluster.check_installed()
        check_travels(on_ray)
    settled, stop = settle(config), StopRequest()
    raced = race(settled, wish, console, stop, study=study, resume=not overwrite, overwrite=overwrite, on_ray=on_ray)
    if raced.elsewhere:
        return Run(raced.folder, {"training": {"steps": raced.steps}, "elsewhere": raced.elsewhere}, False)
    run = stopped_or(raced)
    return run if isinstance(run, Run) else finish_raced(run, settled, console, stop)
