"""Rows of text whose answers stand behind a tag: kept, cut, refused, held out, and asked, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import TINY, tiny_config, write_jsonl
from phinetune import check
from phinetune.api.train import train_config
from phinetune.chats.encoder import make_encoder
from phinetune.chats.tagged_text import PLAIN, ResponseTags
from phinetune.checkpoints.load import Loaded
from phinetune.config.data import DataSection
from phinetune.config.run import RunConfig, make_config
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome
from phinetune.data.prepare.pieces import cut_beginning
from phinetune.data.preview import turns_of
from phinetune.data.read.row import Row
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.errors import ConfigError, DataError
from phinetune.evaluation.answering import questions_of
from phinetune.screen.console import silent
from phinetune.training.prepare import prepare_run, settle

TEXTS = [f"### Question: How many are {i} and {i}?\n### Answer: They are {2 * i}." for i in range(12)]
TAGS = {"response": "### Answer:", "instruction": "### Question:"}


def outcomes(tiny: Loaded, texts: Sequence[str], limit: int | None = None, **options: Any) -> list[RowOutcome]:
    section = DataSection(**{**TAGS, **options})
    tags = ResponseTags(section.response or "", section.instruction)
    encoder = make_encoder(tiny.tokenizer, section.loss_on, tags=tags)
    return list(RowEncoder(section, encoder, limit)(Row(str(i), {"text": text}) for i, text in enumerate(texts)))


def test_a_row_has_its_prompt_and_answer_as_a_chat(tiny: Loaded) -> None:
    (found,) = outcomes(tiny, TEXTS[3:4])
    assert found.chat == [
        {"role": PLAIN, "content": "### Question: How many are 3 and 3?\n### Answer:"},
        {"role": "assistant", "content": "They are 6."},
    ]
    (turn,) = turns_of(found, make_encoder(tiny.tokenizer))
    text = "".join(piece.text for piece in turn.pieces if piece.trained and not piece.special)
    assert (turn.role, text) == ("text", " They are 6.")


def test_a_long_text_loses_its_beginning_and_never_its_last_answer(tiny: Loaded) -> None:
    long = f"{TEXTS[0]}\n{TEXTS[1]}"
    whole = outcomes(tiny, [long])[0].encoded
    assert whole
    (cut,) = outcomes(tiny, [long], limit=40)
    assert cut.cut
    assert cut.encoded
    assert cut.encoded.input_ids == whole.input_ids[-40:]
    assert cut.encoded.labels[1:] == whole.labels[-39:]
    assert outcomes(tiny, [long], limit=8)[0].reason == "longer than 8 tokens"
    assert outcomes(tiny, [long], limit=40, overlong="drop")[0].reason == "longer than 40 tokens"
    assert outcomes(tiny, [long], limit=40, loss_on="all")[0].pieces > 1


def test_the_last_answer_needs_a_token_before_it() -> None:
    text = Encoded([1, 2, 3, 4, 5], [IGNORED, 2, IGNORED, 4, 5])
    assert cut_beginning(text, 3) == Encoded([3, 4, 5], [IGNORED, 4, 5])
    assert cut_beginning(text, 4) == Encoded([2, 3, 4, 5], [IGNORED, IGNORED, 4, 5])
    assert cut_beginning(text, 2) is None


def run_config(folder: Path, texts: Sequence[str], **data: Any) -> RunConfig:
    file = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    config = tiny_config(file, folder / "run", max_steps=2, eval_strategy="steps", eval_steps=2)
    config.data = DataSection(**{**config.data.model_dump(), **TAGS, **data})
    return config


@pytest.mark.parametrize("small", [True, False], ids=["in memory", "as Arrow files"])
def test_texts_are_asked_as_they_stand(tmp_path: Path, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr("phinetune.data.prepare.build_sets.SMALL", 5)
        monkeypatch.setattr("phinetune.data.prepare.arrow_table.cores", lambda: 1)
        monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    prepared = prepare_run(settle(run_config(tmp_path, TEXTS)))
    encoder, held_out = prepared.rows.encoder, prepared.chats.held_out
    assert held_out
    questions = questions_of(encoder, held_out, None)
    assert len(questions) == 3
    for question in questions:
        assert question.prompt + " " + question.reference in TEXTS
        assert question.messages == [{"role": "user", "content": question.prompt}]
        row = held_out.encoded[question.row]
        assert question.ids == row.input_ids[: next(i for i, one in enumerate(row.labels) if one != IGNORED)]


def test_samples_and_the_comparison_show_prompts_and_answers(tmp_path: Path) -> None:
    config = run_config(tmp_path, TEXTS)
    config.evaluation.fixed_prompts = ["### Question: Two?\n### Answer:"]
    train_config(config, silent())
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == {"### Question: Two?\n### Answer:"}
    examples = json.loads((tmp_path / "run" / "results.json").read_text())["examples"]
    assert [f"{one['prompt']} {one['reference']}" in TEXTS for one in examples] == [True] * 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert "### Question: Two?" in page
    config.evaluation.fixed_prompts = ["Two?"]
    with pytest.raises(ConfigError, match="'Two\\?' does not end with '### Answer:'"):
        train_config(config, silent(), overwrite=True)


def test_a_text_without_the_tag_is_named_and_refused_or_dropped(tmp_path: Path) -> None:
    config = run_config(tmp_path, [*TEXTS, "No tag here."])
    with pytest.raises(DataError, match=r"texts.jsonl:13: the text does not hold '### Answer:'"):
        build_chats(prepare_rows(config))
    config.data.invalid_rows = "drop"
    made = build_chats(prepare_rows(config))
    assert made.held_out
    assert made.train.report.kept + made.held_out.report.kept == 12
    report = check({"train": config.data.train, **TAGS}, model=TINY).report.to_dict()
    (found,) = [one for one in report["findings"] if one["kind"] == "response"]
    assert found["places"][0]["where"].endswith("texts.jsonl:13")


def prepare_rows(config: RunConfig) -> RowEncoder:
    from phinetune.checkpoints.tokenizer import open_tokenizer

    return settle(config).row_encoder(open_tokenizer(config.model))


def test_a_tag_for_chats_has_no_effect_and_a_line_says_so(
    chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.data = DataSection(train=str(chats), response="### Answer:")
    build_chats(prepare_rows(config))
    assert "data.response has no effect: no row is a text" in caplog.text


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"response": " "}, "`response` is empty"),
        ({"instruction": "Q:"}, "`instruction` says where a question begins; it needs a text, and `response`"),
        ({"response": "Q:", "instruction": "Q:"}, "are the same text"),
    ],
)
def test_tags_that_say_nothing_are_refused(data: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_config({"data": {"train": "x.jsonl", **data}})


def test_the_keywords_of_older_scripts_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    made = make_config({"data": "x", "training_config": {"response_template": "A:", "instruction_part": "Q:"}})
    assert (made.data.response, made.data.instruction, made.training_config) == ("A:", "Q:", {})
    assert "training_config.response_template is taken as data.response" in caplog.text
    own = make_config({"data": {"train": "x", "response": "B:"}, "training_config": {"response_template": "A:"}})
    assert own.data.response == "B:"
    assert "training_config.response_template has no effect: data.response says it" in caplog.text
    with pytest.raises(ConfigError, match=r"`response_template: \[1, 2\]` is no text; write it as a text"):
        make_config({"data": "x", "training_config": {"response_template": [1, 2]}})
