"""What other libraries say: PEFT's warning for every layer with a bias is one line of phinetune's in its place.

A run's log on a full disk: one sentence, and the run goes on.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from phinetune.logs import log_file, quiet_libraries


@pytest.mark.parametrize("quiet", [False, True])
def test_pefts_warning_for_a_bias_is_quiet(quiet: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if quiet:
            quiet_libraries()
        get_peft_model(nn.Sequential(nn.Linear(4, 4, bias=False)), LoraConfig(target_modules=["0"], lora_bias=True))
    assert any("lora_bias=True" in str(one.message) for one in caught) is not quiet


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")
    with log_file(tmp_path / "run.log"):
        for _ in range(2):
            logging.getLogger("phinetune.some").warning("a line")
    told = capsys.readouterr().err.replace("a line", "")
    assert told.count("no space is left; lines of this log are missing") == 1
    assert "Traceback" not in told
