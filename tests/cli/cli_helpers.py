"""The command line, called in the test's own process."""

from __future__ import annotations

import sys

import pytest

from phinetune.cli import app as cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command line in this process; its exit status. The program counts as being on the path."""
    monkeypatch.setattr("phinetune.cli.program.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "argv", ["phinetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)
