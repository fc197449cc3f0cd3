"""`evaluate` in the library: the run's own held-out chats, options before weights, metrics read once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers import TINY, chat, tiny_config, write_jsonl
from phinetune import evaluate, generate, load, train
from phinetune.api.train import train_config
from phinetune.config.data import OtherSplit
from phinetune.errors import ConfigError, DataError, ModelError, PhinetuneError
from phinetune.exporting.hub.markdown import plain


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.checkpoints.opened.load_base", lambda *_, **__: pytest.fail("weights were loaded"))


def test_a_run_that_held_out_a_share_is_evaluated_on_that_share(tiny_run: Path, quiet: Console) -> None:
    """`eval: 0.25`: the very rows that it was compared on at its end."""
    recorded = json.loads((tiny_run / "results.json").read_text())
    found = evaluate(tiny_run, record=False, console=quiet)
    assert found.data == recorded["data"]["held_out"]
    for side in ("base", "tuned"):
        assert found.results[side]["loss"] == pytest.approx(recorded["evaluation"][side]["loss"], rel=1e-6)
    answers = [example.answers for example in found.examples]
    assert answers == [example["answers"] for example in recorded["examples"]]


def test_a_share_of_a_file_that_has_changed_is_refused(
    rows: list[dict[str, Any]], tmp_path: Path, quiet: Console
) -> None:
    """Another share would hold chats that the run was trained on."""
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    train_config(tiny_config(file, tmp_path / "run", max_steps=1), quiet)
    write_jsonl(file, [*rows, chat("One more?", "One more.")])
    with pytest.raises(DataError, match="not the one that the run was trained on") as caught:
        evaluate(tmp_path / "run", console=quiet)
    assert "--data FILE" in str(caught.value)
    assert evaluate(tmp_path / "run", data=str(file), console=quiet).data["rows"] == 13


def test_rows_that_the_run_was_trained_on_are_counted_and_told(
    tiny_run: Path, chats: Path, rows: list[dict[str, Any]], tmp_path: Path, console: Console
) -> None:
    """Of the run's own twelve rows three were held out, so nine of them are known."""
    others = [chat("Something else?", "No."), chat(rows[1]["messages"][0]["content"], "Another answer.")]
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    data = str(write_jsonl(tmp_path / "data.jsonl", [*rows, *others]))
    found = evaluate(run, data, {"generate": False}, console=console)
    assert found.overlap == {"rows": 14, "copies": 9, "near_copies": 0, "same_prompt": 1}
    told = "9 of 14 held-out chats are copies of training rows; the comparison is too kind"
    assert found.flags[0] == told
    assert told in console.file.getvalue()  # type: ignore[attr-defined]
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["data"]["overlap"] == found.overlap
    assert kept["flags"][:1] == [told]


def test_training_rows_that_are_gone_are_not_counted(
    rows: list[dict[str, Any]], tmp_path: Path, quiet: Console
) -> None:
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    train_config(tiny_config(file, tmp_path / "run", max_steps=1), quiet)
    data = str(write_jsonl(tmp_path / "data.jsonl", rows))
    file.write_text("{")
    assert evaluate(tmp_path / "run", data, {"generate": False}, console=quiet).overlap is None
    file.unlink()
    found = evaluate(tmp_path / "run", data, {"generate": False}, console=quiet)
    assert found.overlap is None
    told = f"the held-out chats were not compared with the training rows, because {file} is gone"
    assert found.flags[0] == told
    assert told in json.loads((tmp_path / "run" / "evaluation.json").read_text())["flags"]


def test_a_run_on_a_stream_says_which_rows_were_compared(chats: Path, tmp_path: Path, console: Console) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.data.streaming = True
    config.data.eval = str(write_jsonl(tmp_path / "held.jsonl", [chat("Something else?", "No.")]))
    config.evaluation.generate = False
    results = train_config(config, console).results
    told = "the held-out chats were compared with the first 12 training rows only, because the rest of a stream"
    assert results["data"]["not_compared"].startswith(told)
    assert results["flags"][0] == results["data"]["not_compared"]
    assert plain(results["flags"][0]) in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "report.html").is_file()
    before = console.file.getvalue().partition("The first chats as the model sees them")[0]  # type: ignore[attr-defined]
    assert told[:60] in before
    assert evaluate(tmp_path / "run", console=console, record=False).flags == results["flags"]


def test_a_recorded_split_is_evaluated_again(rows: list[dict[str, Any]], tmp_path: Path, quiet: Console) -> None:
    for split, part in (("train", rows[:8]), ("validation", rows[6:])):
        write_jsonl(tmp_path / f"{split}.jsonl", part)
    config = tiny_config(tmp_path, tmp_path / "run", max_steps=1)
    config.data.eval = OtherSplit(split="validation")
    config.evaluation.generate = False
    made = train_config(config, quiet).results
    assert made["data"]["overlap"] == {"rows": 6, "copies": 2, "near_copies": 0, "same_prompt": 0}
    assert "2 of 6 held-out chats are copies of training rows" in made["flags"][0]
    again = evaluate(tmp_path / "run", console=quiet, record=False)
    assert again.overlap == made["data"]["overlap"]
    assert again.data == made["data"]["held_out"]
    assert again.results["tuned"]["loss"] == pytest.approx(made["evaluation"]["tuned"]["loss"], rel=1e-6)
    page = (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert all("2 of 6 held-out chats are copies" in text for text in (page, card))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluation": {"max_promts": 1}}, "there is no key `max_promts`"),
        ({"evaluation": {"metrics": ["bleuu"]}}, "there is no metric `bleuu`"),
        ({"evaluation": {"metrics": [{"name": "own", "function": "nowhere.py:score"}]}}, "no such file: nowhere.py"),
        ({"tag": "topic"}, "--tag topic: no row of"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"dtype": "float61"}, "model.dtype"),
    ],
    ids=["key", "metric", "metric file", "tag", "data", "dtype"],
)
def test_options_are_looked_at_before_weights_are_loaded(
    tiny_run: Path, quiet: Console, no_weights: None, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PhinetuneError) as caught:
        evaluate(tiny_run, console=quiet, **options)
    assert words in str(caught.value)


def test_a_path_without_a_model_is_told_as_that(quiet: Console, no_weights: None) -> None:
    with pytest.raises(ModelError, match="no where: no such folder"):
        evaluate("no where", console=quiet)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_k": -2}, "top_k: -2"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"prompt": "  "}, "the prompt is empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_answer_that_can_not_be_had_is_refused_before_weights_are_loaded(
    no_weights: None, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(TINY, **{"prompt": "Hi", **options})
    assert words in str(caught.value)


def test_a_metric_file_is_run_once_a_run(chats: Path, tmp_path: Path, quiet: Console) -> None:
    """It may load a judge of its own, or write somewhere."""
    log = tmp_path / "ran.txt"
    own = tmp_path / "own.py"
    own.write_text(
        f"with open({str(log)!r}, 'a') as file:\n    file.write('once ')\n"
        "def score(answer, reference):\n    return len(answer)\n"
    )
    config = tiny_config(chats, tmp_path / "run", max_steps=2, eval_strategy="steps", eval_steps=1)
    tree = config.model_dump()
    tree["evaluation"] |= {"metrics": [{"name": "own", "function": f"{own}:score"}], "metrics_while_training": True}
    tree["evaluation"]["fixed_prompts"] = 1
    made = train(
        model=tree["model"],
        data=tree["data"],
        peft_config=tree["peft_config"],
        training_config=tree["training_config"],
        evaluation=tree["evaluation"],
        console=quiet,
    )
    assert "own" in made.results["evaluation"]["tuned"]
    assert log.read_text() == "once "


def test_an_answer_is_the_models_own(tiny_run: Path) -> None:
    answer = generate(tiny_run, "How many?", max_new_tokens=4)
    model, tokenizer = load(tiny_run)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer.text == tokenizer.decode(made, skip_special_tokens=True)
    assert generate(tiny_run, "How many?", max_new_tokens=4, base=True).text != answer.text


def test_what_an_evaluation_does_not_read_is_named(
    rows: list[dict[str, Any]], tiny_run: Path, tmp_path: Path, console: Console
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{**row, "persona": "A pirate."} for row in rows[:3]])
    made = evaluate(tiny_run, str(data), {"generate": False}, console=console, record=False)
    assert made.data["unused"] == {"persona": 3}
    assert "columns not used: persona (3)" in console.file.getvalue()  # type: ignore[attr-defined]
