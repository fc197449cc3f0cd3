"""`phinetune tune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from phinetune.cli.options import Overwrite, SetOption
from phinetune.cli.program import again, program
from phinetune.cli.train import STOPPED, say_next
from phinetune.errors import ConfigError
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file")],
    trials: Annotated[
        Optional[int],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="how many learning rates; beyond those of --rates, optuna looks for good ones"),
    ] = None,
    rates: Annotated[
        str, typer.Option(metavar="A,B,…", help="learning rates; else the rule's, half and twice it")
    ] = "",
    ranks: Annotated[str, typer.Option(metavar="A,B,…", help="ranks to try as well, with the best rate")] = "",
    epochs: Annotated[str, typer.Option(metavar="A,B,…", help="epochs to try as well; each trains to its end")] = "",
    study: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH|URL", help="SQLite file, journal (.log) or database that several processes share"),
    ] = None,
    overwrite: Overwrite = False,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Try learning rates (and ranks, epochs) on the held-out rows; the best becomes the run. Again: it goes on."""
    with libraries():
        from phinetune.api.tune import tune_config
        from phinetune.config.run import load_config
        from phinetune.training.race_field import Wish

    wish = Wish(
        trials, _numbers("rates", rates, float), _numbers("ranks", ranks, int), _numbers("epochs", epochs, float)
    )
    made = tune_config(load_config(config, overrides), wish, stdout(), study=study, overwrite=overwrite)
    page = made.path / "report.html"
    given = {"--trials": trials, "--rates": rates, "--ranks": ranks, "--epochs": epochs, "--study": study}
    command = f"{program()} tune {config}{again(given, overrides)}"
    if made.stopped and not (made.path / "config.yaml").is_file():
        words = [f"Stopped; what was found up to here is in {made.path}, a picture in {page}. Go on with:"]
        say(stdout(), [*words, f"  {command}"])
        sys.exit(STOPPED)
    if "elsewhere" in made.results:
        say(stdout(), [f"Wrote {page}. The winner, {made.results['elsewhere']}: its run ends there."])
        return
    say_next(made, command, more="")
    say(stdout(), f"The candidates, with a picture: {made.path}-tune/report.html")


def _numbers(name: str, text: str, kind: Any) -> tuple[Any, ...]:
    """The numbers of a list with commas.

    Raises:
        ConfigError: one of them is none.
    """
    try:
        return tuple(kind(one) for one in text.replace(" ", "").split(",") if one)
    except ValueError:
        raise ConfigError(f"--{name} {text}: give numbers with commas between them") from None
