"""Base against tuned: the same numbers as by hand, in one table."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from helpers import read_rows
from phinetune.checkpoints.adapters import attach_adapter, usable_adapter
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.opened import Opened, open_model
from phinetune.config.data import DataSection
from phinetune.config.evaluation import EvaluationSection
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.collect_sets import build_set
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.read.row import Row
from phinetune.engine.scoring import score_rows
from phinetune.errors import DataError, RunError
from phinetune.evaluation.bootstrap import NOT_FINITE
from phinetune.evaluation.compare import Comparison, compare
from phinetune.evaluation.metrics import open_metrics
from phinetune.metric_table import measured
from phinetune.screen.comparison import show_comparison


@pytest.fixture
def tuned(tiny_run: Path) -> Opened:
    return open_model(tiny_run)


@pytest.fixture
def held_out(tuned: Opened, chats: Path) -> ChatSet:
    return build_set("chats", read_rows(str(chats)), RowEncoder(DataSection(), tuned.encoder, None))


def compared(model: Any, tuned: Opened, held_out: ChatSet, **options: Any) -> Comparison:
    section = EvaluationSection(**{"max_new_tokens": 8, "max_prompts": 4, "batch_size": 3, **options})
    return compare(model, tuned.loaded.tokenizer, tuned.encoder, held_out, section, open_metrics(section))


def mean_loss(model: Any, held_out: ChatSet) -> float:
    nll, count = 0.0, 0
    for row in held_out.encoded:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        nll += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return nll / count


def test_both_sides_score_as_by_hand(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    results = compared(tuned.model, tuned, held_out).results
    for name, side in (("base", tuned.model.disable_adapter()), ("tuned", contextlib.nullcontext())):
        with side:
            assert results[name]["loss"] == pytest.approx(mean_loss(tuned.model, held_out), rel=1e-4)
    assert results["tuned"]["loss"] < results["base"]["loss"]


def test_every_prompt_is_answered_by_both(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    made = compared(tuned.model, tuned, held_out)
    assert made.results["base"]["prompts"] == len(made.examples) == 4
    first = made.examples[0]
    assert first.prompt == "And one more?"  # the last user turn of a chat in two exchanges
    assert first.reference == "1!"
    assert set(first.answers) == {"base", "tuned"}


def test_scoring_alone_answers_nothing(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    held = compared(tuned.model, tuned, held_out, generate=False).results["tuned"]
    assert set(held) == {"loss", "perplexity", "token_accuracy", "labelled_tokens", "prompts"}
    assert held["prompts"] == 0
    assert held["labelled_tokens"] == held_out.report.trainable_tokens


def test_a_model_without_an_adapter_is_measured_alone(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    base = open_model(tuned.config.model.path)
    made = compared(base.model, base, held_out)
    assert list(made.results) == ["base"]
    show_comparison(made, console)


def test_answers_equal_to_their_references_match(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    """The references are set to what the tuned model answers, so it scores full marks and the base does not."""
    made = compared(tuned.model, tuned, held_out)
    for chat, example in zip(held_out.chats, made.examples, strict=False):
        chat[-1]["content"] = example.answers["tuned"]
    again = compared(tuned.model, tuned, held_out).results
    assert again["tuned"]["exact_match"] == 100
    assert again["base"]["exact_match"] < 100


def test_the_table_shows_both_and_what_changed(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    made = compared(tuned.model, tuned, held_out)
    show_comparison(made, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(measure.heading in shown for measure in measured(made.results))
    base, after = made.results["base"]["loss"], made.results["tuned"]["loss"]
    assert f"{base:.4f} │ {after:.4f} │ {after - base:+.4f}" in shown


def test_the_difference_in_every_measure_has_an_interval_and_a_verdict(
    tuned: Opened, held_out: ChatSet, console: Console
) -> None:
    made = compared(tuned.model, tuned, held_out, metrics=["exact_match", "chrf"])
    scored = {"loss", "perplexity", "token_accuracy"}
    assert set(made.differences) == scored | {"exact_match", "chrf", "stopped", "repeating"}
    loss = made.differences["loss"]
    assert loss.change == pytest.approx(made.results["tuned"]["loss"] - made.results["base"]["loss"])
    assert loss.low < loss.change < loss.high
    assert (loss.rows, loss.verdict) == (len(held_out), "better")
    assert made.differences["repeating"].rows == 4
    show_comparison(made, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"│ {loss.low:+.4f} to {loss.high:+.4f} │ better" in shown


def test_everything_found_is_the_same_after_json(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    tree = compared(tuned.model, tuned, held_out).to_tree()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert set(tree) == {"evaluation", "differences", "by_tag", "json_fields", "classes", "own", "flags", "examples"}
    assert tree["examples"][0]["scores"]["tuned"]["exact_match"] in (0, 100)


def test_results_are_split_by_the_tag_column(tuned: Opened, rows: list[dict[str, Any]], console: Console) -> None:
    tagged = [Row(f"r:{i}", {**row, "task": "even" if i % 2 == 0 else "odd"}) for i, row in enumerate(rows)]
    held_out = build_set("rows", tagged, RowEncoder(DataSection(tag="task"), tuned.encoder, None))
    made = compared(tuned.model, tuned, held_out, max_prompts=5)
    assert {tag: found["rows"] for tag, found in made.by_tag.items()} == {"even": 6, "odd": 6}
    assert {tag: found["tuned"]["prompts"] for tag, found in made.by_tag.items()} == {"even": 3, "odd": 2}
    even = build_set("even", tagged[::2], RowEncoder(DataSection(), tuned.encoder, None))
    alone = compared(tuned.model, tuned, even, max_prompts=3).results["tuned"]
    for key, value in alone.items():
        assert made.by_tag["even"]["tuned"][key] == pytest.approx(value, rel=1e-5), key
    tokens = sum(found["base"]["labelled_tokens"] for found in made.by_tag.values())
    assert tokens == made.results["base"]["labelled_tokens"]
    show_comparison(made, console)
    assert "│ odd" in console.file.getvalue()  # type: ignore[attr-defined]


def test_perplexity_is_that_of_transformers_own_loss(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    """One padded batch through transformers' forward with labels."""
    width = max(len(row.input_ids) for row in held_out.encoded)
    ids, mask, labels = (
        torch.tensor([(row + [fill] * width)[:width] for row in rows])
        for fill, rows in (
            (0, [row.input_ids for row in held_out.encoded]),
            (0, [[1] * len(row.input_ids) for row in held_out.encoded]),
            (-100, [row.labels for row in held_out.encoded]),
        )
    )
    found = compared(tuned.model, tuned, held_out, generate=False).results
    for name, side in (("base", tuned.model.disable_adapter()), ("tuned", contextlib.nullcontext())):
        with side, torch.no_grad():
            loss = tuned.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert found[name]["perplexity"] == pytest.approx(float(loss.double().exp()), rel=1e-5)


def test_a_model_without_a_packed_form_scores_alike(
    tiny_run: Path, tuned: Opened, held_out: ChatSet, console: Console
) -> None:
    fast = score_rows(tuned.model, held_out.encoded, 3)
    plain = load_base(tuned.config.model, fast=False)
    model = attach_adapter(plain, tiny_run, usable_adapter(tiny_run, tuned.config.model))
    for one, other in zip(score_rows(model, held_out.encoded, 5), fast, strict=True):
        assert (one.tokens, one.correct) == (other.tokens, other.correct)
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


def test_a_model_that_never_stops_is_flagged(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    tuned.model.get_base_model().generation_config.eos_token_id = []
    made = compared(tuned.model, tuned, held_out, max_new_tokens=30)
    assert made.results["tuned"]["stopped"] == 0
    assert made.flags[0] == (
        "100% of the answers of tuned never stopped: they were cut at 30 tokens (evaluation.max_new_tokens)"
    )
    show_comparison(made, console)
    assert "Look: 100% of the answers of tuned never stopped" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_numbers_that_are_not_finite_is_said_to_have_them(
    tuned: Opened, held_out: ChatSet, console: Console, value: float
) -> None:
    with torch.no_grad():
        next(p for n, p in tuned.model.named_parameters() if "lora_B" in n).fill_(value)
    made = compared(tuned.model, tuned, held_out)
    assert made.differences["loss"].verdict == NOT_FINITE
    assert made.flags[0] == "loss, perplexity of tuned: not finite, so the models can't be compared by it"
    tree = made.to_tree()
    assert tree["differences"]["loss"]["verdict"] == NOT_FINITE
    assert tree["differences"]["loss"]["change"] is None
    json.dumps(tree, allow_nan=False)
    show_comparison(made, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "nan" not in shown
    (row,) = [line for line in shown.splitlines() if "loss (nats" in line]
    assert [cell.strip() for cell in row.split("│")[3:7]] == ["not finite", "not finite", "", "not finite"]


def test_a_metric_of_which_no_answer_has_two_numbers_has_no_difference(tuned: Opened, held_out: ChatSet) -> None:
    calls: list[int] = []

    def second_model_only(answer: str, reference: str, messages: Any) -> float | None:
        calls.append(1)
        return 1.0 if len(calls) > 4 else None

    section = EvaluationSection(max_new_tokens=2, max_prompts=4, batch_size=3)
    metrics = {"late": second_model_only}
    made = compare(tuned.model, tuned.loaded.tokenizer, tuned.encoder, held_out, section, metrics)
    assert made.results["tuned"]["late"] == 1.0
    assert "late" not in made.differences


def count_words(answers: list[str], references: list[str]) -> dict[str, float]:
    return {"words": float(sum(len(answer.split()) for answer in answers)), "of": float(len(references))}


OVER_THE_SET = [{"name": "many", "compute": count_words, "less_is_better": True}, {"name": "sum", "classes": "auto"}]


def test_metrics_over_the_set_stand_beside_the_others(tuned: Opened, held_out: ChatSet, console: Console) -> None:
    """The base is the tuned model with its adapter off, so by hand both have the numbers of their own answers."""
    tags = ["odd" if i % 2 else "" for i in range(len(held_out))]
    made = compared(tuned.model, tuned, replace(held_out, tags=tags), metrics=OVER_THE_SET)
    references = [one.reference for one in made.examples]
    for name, numbers in made.results.items():
        texts = [one.answers[name] for one in made.examples]
        assert numbers["many_words"] == count_words(texts, references)["words"]
        assert numbers["sum_accuracy"] == 100 * sum(a == b for a, b in zip(texts, references, strict=True)) / 4
        odd = [one.answers[name] for i, one in enumerate(made.examples) if i % 2]
        assert made.by_tag["odd"][name]["many_words"] == count_words(odd, [])["words"]
        assert sum(map(sum, made.classes["sum"]["sides"][name]["matrix"])) == 4
    assert made.classes["sum"]["labels"] == sorted(references)
    assert {"many_words", "sum_macro_f1"} <= made.differences.keys()
    assert made.own["many_words"] == {"less_is_better": True, "is_percent": False}
    assert made.own["sum_macro_f1"] == {"less_is_better": False, "is_percent": True}
    show_comparison(made, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "many words ↓" in shown
    assert "sum macro-F1 %" in shown
    assert "↓ less is better" in shown
    assert "sum: class" in shown


def test_a_metric_that_fails_on_a_tag_alone_is_left_out_there_and_told(tuned: Opened, held_out: ChatSet) -> None:
    def needs_four(answers: list[str], references: list[str]) -> float:
        return 1 / (len(answers) == 4)

    tags = ["odd" if i % 2 else "even" for i in range(len(held_out))]
    metrics = [{"name": "four", "compute": needs_four, "resamples": 0}, "chrf"]
    made = compared(tuned.model, tuned, replace(held_out, tags=tags), metrics=metrics)
    assert made.results["tuned"]["four"] == 1
    assert "four" not in made.by_tag["odd"]["tuned"]
    assert "chrf" in made.by_tag["odd"]["tuned"]
    told = [
        flag for flag in made.flags if flag.startswith("of tag 'odd', base: evaluation.metrics: `four` failed on 2")
    ]
    assert len(told) == 1


def test_a_function_that_raises_is_told_with_its_prompt(tuned: Opened, held_out: ChatSet) -> None:
    def picky(answer: str, reference: str) -> float:
        return 1 / (reference != "They are 2.")

    with pytest.raises(RunError, match=r"`picky` failed on the answer .*ZeroDivisionError.* \(held-out prompt 2\)"):
        compared(tuned.model, tuned, held_out, metrics=[picky])


def test_references_that_are_no_label_are_refused_before_an_answer(tuned: Opened, held_out: ChatSet) -> None:
    with pytest.raises(DataError, match="4 of the 4 held-out prompts have answers of their own that name none"):
        compared(tuned.model, tuned, held_out, metrics=[{"name": "topic", "classes": ["one", "two"]}])
