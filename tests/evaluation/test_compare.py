"""Base against tuned: the same numbers as by hand, in one table."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from phinetune.config import DataSection, EvaluationSection
from phinetune.data.build import ChatSet, build_set, read_all
from phinetune.evaluation.compare import Comparison, compare
from phinetune.evaluation.screen import show_comparison
from phinetune.measures import measured
from phinetune.tuned import Tuned, open_model


@pytest.fixture
def tuned(tiny_run: Path) -> Tuned:
    return open_model(tiny_run)


@pytest.fixture
def held_out(tuned: Tuned, chats: Path) -> ChatSet:
    return build_set("chats", read_all(str(chats), "train"), DataSection(), tuned.encoder, None)


def compared(model: Any, tuned: Tuned, held_out: ChatSet, console: Console, **options: Any) -> Comparison:
    section = EvaluationSection(**{"max_new_tokens": 8, "max_prompts": 4, "batch_size": 3, **options})
    return compare(model, tuned.loaded.tokenizer, tuned.encoder, held_out, section, console)


def mean_loss(model: Any, held_out: ChatSet) -> float:
    nll, count = 0.0, 0
    for row in held_out.encoded:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        nll += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return nll / count


def test_both_sides_score_as_by_hand(tuned: Tuned, held_out: ChatSet, console: Console) -> None:
    results = compared(tuned.model, tuned, held_out, console).results
    for name, side in (("base", tuned.model.disable_adapter()), ("tuned", contextlib.nullcontext())):
        with side:
            assert results[name]["loss"] == pytest.approx(mean_loss(tuned.model, held_out), rel=1e-4)
    assert results["tuned"]["loss"] < results["base"]["loss"]


def test_every_prompt_is_answered_by_both(tuned: Tuned, held_out: ChatSet, console: Console) -> None:
    made = compared(tuned.model, tuned, held_out, console)
    assert made.results["base"]["prompts"] == len(made.examples) == 4
    first = made.examples[0]
    assert first.prompt == "And one more?"  # the last user turn of a chat in two exchanges
    assert first.reference == "1!"
    assert set(first.answers) == {"base", "tuned"}


def test_scoring_alone_answers_nothing(tuned: Tuned, held_out: ChatSet, console: Console) -> None:
    held = compared(tuned.model, tuned, held_out, console, generate=False).results["tuned"]
    assert set(held) == {"loss", "perplexity", "token_accuracy", "labelled_tokens", "prompts"}
    assert held["prompts"] == 0
    assert held["labelled_tokens"] == held_out.report.trainable_tokens


def test_a_plain_model_is_measured_alone(tuned: Tuned, held_out: ChatSet, console: Console) -> None:
    plain = open_model(tuned.config.model.path)
    made = compared(plain.model, plain, held_out, console)
    assert list(made.results) == ["base"]
    show_comparison(made, console)


def test_answers_equal_to_their_references_match(tuned: Tuned, held_out: ChatSet, console: Console) -> None:
    """The references are set to what the tuned model answers, so it scores full marks and the base does not."""
    made = compared(tuned.model, tuned, held_out, console)
    for chat, example in zip(held_out.chats, made.examples, strict=False):
        chat[-1]["content"] = example.answers["tuned"]
    again = compared(tuned.model, tuned, held_out, console).results
    assert again["tuned"]["exact_match"] == 100
    assert again["base"]["exact_match"] < 100


def test_the_table_shows_both_and_what_changed(tuned: Tuned, held_out: ChatSet, console: Console) -> None:
    made = compared(tuned.model, tuned, held_out, console)
    show_comparison(made, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(measure.heading in shown for measure in measured(made.results))
    base, after = made.results["base"]["loss"], made.results["tuned"]["loss"]
    assert f"{base:.4f} │ {after:.4f} │ {after - base:+.4f}" in shown
