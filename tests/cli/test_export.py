"""The help of `phinetune export` names what the table of targets has."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from phinetune.cli.app import app
from phinetune.exporting.targets import TARGETS


def helps() -> dict[str, str]:
    top: Any = typer.main.get_command(app)
    return {option.name: option.help for option in top.commands["export"].params if hasattr(option, "help")}


@pytest.mark.parametrize("target", TARGETS)
def test_the_help_names_every_target_and_its_types(target: str) -> None:
    assert target in helps()["to"]
    assert all(kind in helps()["kind"] for kind in TARGETS[target].types)
