"""The demo's command, from its bundled files to what it says at the end; here on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.cli_helpers import run
from helpers import TINY
from phinetune.config.run import load_config
from phinetune.demo_data.demo_config import PREFERENCE, STYLES, demo_config


def test_the_bundled_files_are_named_by_their_places() -> None:
    config = demo_config(Path("runs/demo"))
    assert config.model.path == "starter"
    assert Path(str(config.data.train)).is_file()
    assert Path(str(config.data.eval)).is_file()
    assert config.output_dir == Path("runs/demo")


def test_the_demo_of_preferences_goes_on_from_its_first_half() -> None:
    first = demo_config(Path("runs/styles"), name=STYLES)
    second = demo_config(Path("runs/preference"), ["model.adapter=runs/styles"], PREFERENCE)
    assert (first.objective.kind, second.objective.kind) == ("sft", "dpo")
    assert second.model.adapter == "runs/styles"
    assert all(Path(str(place)).is_file() for one in (first, second) for place in (one.data.train, one.data.eval))


@pytest.mark.parametrize(("answers", "gained"), [("true", "exact match 0% → 0%."), ("false", ".")])
def test_the_demo_ends_with_its_gain_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answers: str, gained: str
) -> None:
    settings = [f"model.path={TINY!r}", "training_config.max_steps=2", f"evaluation.generate={answers}"]
    settings += ["evaluation.max_prompts=2", "evaluation.max_new_tokens=3", "training_config.save_strategy='no'"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert run(monkeypatch, "demo", "--output-dir", tmp_path / "run", *overrides) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    (gain,) = [line for line in lines if line.startswith("Gained on 80 held-out chats: loss ")]
    assert gain.endswith(gained)
    assert [line.split()[1] for line in lines[-4:]] == ["chat", "generate", "evaluate", "export"]
    assert load_config(tmp_path / "run" / "config.yaml").training_config["max_steps"] == 2
