"""What the curves say and what was kept stand on the page of a run and in its card."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from phinetune.config.run import RunConfig
from phinetune.exporting.hub.card import write_card
from phinetune.reporting.facts import read_run
from phinetune.reporting.render import run_page
from phinetune.reporting.views import data_rows, kept_rows
from phinetune.screen.console import Screen
from phinetune.screen.curves import show_curves
from phinetune.screen.kept import show_kept
from phinetune.screen.settings import show_settings
from phinetune.training.auto_settings import Choice
from reporting.report_helpers import DATA, EVALUATION, make_run

CURVES = [{"kind": "sound", "text": "Sound: it fell."}, {"kind": "spike", "text": "Spike: look at 'my secret row'"}]
KEPT: dict[str, Any] = {
    "results": {"base": {"loss": 1.5, "right": 50.0}, "tuned": {"loss": 1.75, "right": 40.0}},
    "differences": {"right": {"text": "no clear difference"}},
    "by_tag": {"code": {"rows": 8, "base": {"loss": 1.0}, "tuned": {"loss": None}}},
    "rows": 30,
    "answers": 6,
    "share": 0.08,
    "text": "Forgotten: a little. Answers right: no clear difference.",
}


def test_the_page_has_the_words_and_the_losses_on_neutral_chats(tmp_path: Path) -> None:
    page = run_page(read_run(make_run(tmp_path / "run", curves=CURVES, kept=KEPT)))
    assert "What the curves say" in page
    assert "Sound: it fell." in page
    assert "Forgotten: a little." in page
    assert kept_rows({"kept": KEPT}) == [("all", ["30", "1.5000", "1.7500"]), ("code", ["8", "1.0000", "—"])]
    plain = run_page(read_run(make_run(tmp_path / "older")))
    assert "What the curves say" not in plain
    assert "neutral chats" not in plain


def test_the_card_has_the_words_but_no_rows_of_the_data() -> None:
    training = {"steps": 1, "epochs": 1.0, "tokens": 9, "seconds": 1.0, "tokens_per_s": 9.0, "trainable_parameters": 4}
    replay = {"rows": 5, "prompts": 5, "tokens": 99}
    results = {"base": {"path": "starter", "revision": None}, "training": training, "evaluation": EVALUATION}
    results |= {"curves": CURVES, "kept": KEPT, "data": {**DATA, "replay": replay}}
    card = write_card(RunConfig(), results, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    assert "Sound: it fell." in card
    assert "my secret row" not in card
    assert "Forgotten: a little." in card
    assert "mixed in: 5 answers of the base" in card


def test_the_table_of_data_tells_what_was_mixed_in() -> None:
    rows = dict(data_rows({**DATA, "replay": {"rows": 5, "prompts": 5, "tokens": 99}}))
    assert rows["answers of the base mixed in"] == ["5", ""]
    assert "answers of the base mixed in" not in dict(data_rows(DATA))


def test_the_terminal_shows_them_too() -> None:
    console = Screen(file=io.StringIO(), width=120)
    show_curves(CURVES, console)
    show_kept(KEPT, console)
    show_kept(None, console)
    chosen = Choice("training_config.learning_rate", 3.6e-4, "the fit for LoRA at hidden size 3,072")
    given = Choice("peft_config.r", 2, "some reason", given=True)
    show_settings([chosen, given], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Curves: Sound: it fell." in text
    assert "30 neutral chats, 6 answered (took 8% of the evaluation)" in text
    assert "not finite" in text
    assert "Forgotten: a little. Answers right: no clear difference." in text
    assert "0.00036" in text
    assert "Look: peft_config.r: 2: some reason" in text
