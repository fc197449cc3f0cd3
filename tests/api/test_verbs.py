"""The library is the command line: a function for each verb, with the same defaults."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import phinetune
from phinetune.cli.app import app

# A verb whose function has another name: `phinetune.config` is the package of the configuration.
OTHER_NAMES = {"config": "describe_config"}
# What a name of the command line is called in the library, and what stands for files that only one of them reads.
RENAMED = {"run": "path", "as_json": None, "out": "out", "config": None, "overrides": None, "runs": "runs"}


def commands() -> Iterator[tuple[str, Any]]:
    """Every verb of the command line, those of groups too."""
    top: Any = typer.main.get_command(app)
    for name, command in top.commands.items():
        yield from getattr(command, "commands", {name: command}).items()


VERBS = dict(commands())


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_a_function(verb: str) -> None:
    function = getattr(phinetune, OTHER_NAMES.get(verb, verb))
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in OTHER_NAMES])
def test_a_verb_and_its_function_have_the_same_defaults(verb: str) -> None:
    parameters = inspect.signature(getattr(phinetune, verb)).parameters
    compared = 0
    for option in VERBS[verb].params:
        own = parameters.get(option.name)
        if own is None or own.default is inspect.Parameter.empty or option.required:
            continue
        ours, theirs = own.default, option.default() if callable(option.default) else option.default
        assert (ours or None) == (str(theirs) if isinstance(theirs, Path) else theirs or None), option.name
        compared += 1
    assert compared or verb in ("preview",)


@pytest.mark.parametrize("name", phinetune.__all__)
def test_a_function_is_no_module_whatever_was_imported_before(name: str) -> None:
    """A room of the same name would take the function's place as soon as it is imported."""
    for module in pkgutil.iter_modules(phinetune.__path__):
        if module.name != "__main__":
            importlib.import_module(f"phinetune.{module.name}")
    assert inspect.isfunction(getattr(phinetune, name))


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, phinetune; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "phinetune", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Fine-tune a Phi-3" in done.stdout
