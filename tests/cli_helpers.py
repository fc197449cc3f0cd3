"""The command line, called in the test's own process."""

from __future__ import annotations

import sys

import pytest

from phinetune.cli import app as cli
from phinetune.cli import data as cli_data
from phinetune.cli import report as cli_report


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command line in this process; its exit status. The program counts as being on the path."""
    for module, name in ((cli, "_program"), (cli_data, "program"), (cli_report, "program")):
        monkeypatch.setattr(module, name, lambda: "phinetune")
    monkeypatch.setattr(sys, "argv", ["phinetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)
