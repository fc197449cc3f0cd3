"""`phinetune tune` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny_config
from phinetune.cli.tune import _numbers
from phinetune.config.run import dump_config
from phinetune.errors import ConfigError


def test_numbers_stand_with_commas_between_them() -> None:
    assert _numbers("rates", "1e-3, 2e-3", float) == (1e-3, 2e-3)
    assert _numbers("ranks", "", int) == ()
    with pytest.raises(ConfigError, match=r"--ranks 8;16: give numbers with commas"):
        _numbers("ranks", "8;16", int)


def test_tune_says_what_it_wrote_and_what_to_do_next(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from phinetune.cli.tune import tune

    config = tiny_config(chats, tmp_path / "run")
    config.evaluation.enabled = False
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    tune(file, trials=None, rates="1e-2,2e-2", ranks="", epochs="", study=None, overwrite=False, overrides=[])
    shown = capsys.readouterr().out
    assert "A race of learning_rate: 0.01, 0.02; the 2 train to step 2 and the best goes on." in shown
    assert f"Wrote {tmp_path / 'run'}" in shown
    assert f"{tmp_path / 'run'}-tune/report.html" in shown
    assert shown.count("optuna") == 0
