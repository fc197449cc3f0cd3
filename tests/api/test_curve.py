"""`phinetune curve`: growing shares of the rows, kept where they are finished, and a page of what they show."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import phinetune
from cli.cli_helpers import run
from helpers import TINY, chat, write_jsonl
from phinetune.api.curve import curve_config
from phinetune.config.run import RunConfig, make_config
from phinetune.errors import ConfigError, DataError, RunError
from phinetune.screen.console import Console
from phinetune.training import prepare
from phinetune.training.callbacks import StopRequest


def rows(count: int) -> list[dict[str, Any]]:
    return [{**chat(f"How many are {i} and {i}?", f"They are {2 * i}."), "kind": "ab"[i % 2]} for i in range(count)]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(
        {
            "model": TINY,
            "data": {
                "train": str(write_jsonl(tmp_path / "chats.jsonl", rows(32))),
                "eval": str(write_jsonl(tmp_path / "held.jsonl", rows(60)[32:])),
                "tag": "kind",
            },
            "peft_config": {"r": 4},
            "training_config": {
                "output_dir": str(tmp_path / "run"),
                "learning_rate": 1e-2,
                "max_steps": 16,
                "per_device_train_batch_size": 2,
                "eval_strategy": "no",
                "save_steps": 2,
                "logging_steps": 1,
            },
        }
    )


def test_a_curve_is_drawn_kept_and_gone_on_with(
    config: RunConfig, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run-curve"
    asked = StopRequest.on_step_end

    def stopping(self: StopRequest, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.requested |= "1-of-2" in args.output_dir and state.global_step == 4
        asked(self, args, state, control, **more)

    monkeypatch.setattr(StopRequest, "on_step_end", stopping)
    stopped = curve_config(config, console)
    assert (stopped.stopped, stopped.path) == (True, folder)
    written = (folder / "scores-1-of-4.json").stat().st_mtime_ns
    monkeypatch.undo()

    made = curve_config(config, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Finished before: 1-of-8, 1-of-4" in shown
    assert (folder / "scores-1-of-4.json").stat().st_mtime_ns == written
    assert json.loads((folder / "1-of-2" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
    tree = json.loads((folder / "curve.json").read_text())
    assert tree == made.results
    assert [(one["name"], one["rows"], one["steps"]) for one in tree["points"]] == [
        ("1-of-8", 4, 2),
        ("1-of-4", 8, 4),
        ("1-of-2", 16, 8),
        ("all", 32, 16),
    ]
    assert tree["forecast"]["rows"] == 64
    assert tree["forecast"]["low"] <= tree["forecast"]["gain"] <= tree["forecast"]["high"]
    assert tree["check"]["text"] in shown
    assert tree["hard"]["looked_at"] == ["tag", "length"]
    page = (folder / "curve.html").read_text()
    assert tree["forecast"]["text"].split(":")[0] in html.unescape(page)
    assert page.count('class="to"') == 4
    assert all("only 28 held-out chats" in place for place in (tree["flags"][0], page, shown))
    # The last run is an ordinary one: the same configuration gives the same losses.
    plain = phinetune.train(**_sections(config, tmp_path / "plain"))
    assert _losses(plain.path) == _losses(folder / "all")
    config.training_config["learning_rate"] = 2e-2
    with pytest.raises(RunError, match=r"learning_rate: the run has 0\.01, the configuration now has 0\.02"):
        curve_config(config, console)
    assert json.loads((folder / "curve.json").read_text()) == tree


def test_a_curve_goes_on_where_less_memory_is_free(
    config: RunConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How the rows of a step are divided follows from the memory; the curve keeps what it began with, and its dtype."""
    for key in ("per_device_train_batch_size", "max_steps"):
        config.training_config.pop(key)
    config.training_config["num_train_epochs"] = 1
    monkeypatch.setattr("phinetune.checkpoints.device.has_native_bf16", lambda device: True)
    first = curve_config(config, console)
    assert first.results["chosen"] == {
        "training_config.per_device_train_batch_size": 2,
        "training_config.gradient_accumulation_steps": 1,
    }
    monkeypatch.setattr("phinetune.checkpoints.device.has_native_bf16", lambda device: False)
    monkeypatch.setattr(prepare, "_room", lambda *given: 60)
    assert prepare.prepare_run(prepare.settle(config)).args.per_device_train_batch_size == 1
    again = curve_config(config, console)
    assert again.results == first.results
    assert "Finished before: 1-of-8, 1-of-4, 1-of-2, all" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_damaged_record_of_a_curve_is_told(config: RunConfig, console: Console, tmp_path: Path) -> None:
    (tmp_path / "run-curve").mkdir()
    for text in ("{", "[1]"):
        (tmp_path / "run-curve" / "curve.json").write_text(text)
        with pytest.raises(RunError, match=r"curve\.json: damaged"):
            curve_config(config, console)


def _sections(config: RunConfig, output: Path) -> dict[str, Any]:
    tree = config.model_dump()
    tree["training_config"]["output_dir"] = str(output)
    tree["evaluation"]["enabled"] = False
    return tree


def _losses(path: Path) -> list[float]:
    entries = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_what_no_curve_can_be_drawn_of_is_told_at_once(config: RunConfig, console: Console, tmp_path: Path) -> None:
    without = config.model_copy(deep=True)
    without.data.eval = None
    with pytest.raises(ConfigError, match=r"data\.eval: a curve needs held-out chats"):
        curve_config(without, console)
    racing = config.model_copy(deep=True)
    racing.training_config["learning_rate"] = "race"
    with pytest.raises(ConfigError, match=r"learning_rate: race: all runs of a curve have one rate"):
        curve_config(racing, console)
    few = config.model_copy(deep=True)
    few.data.limit = 15
    with pytest.raises(DataError, match=r"15 rows are too few for a curve; it needs 16"):
        curve_config(few, console)
    assert not (tmp_path / "run-curve").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files that no curve wrote"):
        curve_config(config, console, out=foreign)


def test_the_command_line_says_what_it_wrote_and_begins_anew_if_asked(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.data.limit = 16
    config.training_config |= {"save_strategy": "no", "max_steps": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    losses = []
    for more in ([], ["--overwrite", "--set", "training_config.learning_rate=5e-2"]):
        assert run(monkeypatch, "curve", tmp_path / "run.yaml", "--out", tmp_path / "drawn", *more) == 0
        out = capsys.readouterr().out
        assert "Run 3 of 3: all, about 16 rows" in out
        assert f"the page {tmp_path / 'drawn' / 'curve.html'}" in out.replace("\n", "")
        assert "Next: phinetune chat" in out
        tree = json.loads((tmp_path / "drawn" / "curve.json").read_text())
        assert tree["check"] is None  # three points foretell, and two are too few to be held against the third
        losses.append([point["loss"] for point in tree["points"]])
    assert losses[0] != losses[1]
