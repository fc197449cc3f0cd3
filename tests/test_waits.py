"""A wait that comes once is told, whether or not log lines are shown."""

from __future__ import annotations

import io
import logging

import pytest

from phinetune.waits import tell_wait


def test_it_is_printed_where_no_log_lines_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("alone", logging.INFO)
    tell_wait(logger, "making a thing; once")
    assert capsys.readouterr().err == "making a thing; once\n"


def test_where_log_lines_are_shown_it_is_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    logger, shown = logging.Logger("heard", logging.INFO), io.StringIO()
    logger.addHandler(logging.StreamHandler(shown))
    tell_wait(logger, "making a thing; once")
    assert shown.getvalue() == "making a thing; once\n"
    assert capsys.readouterr().err == ""
