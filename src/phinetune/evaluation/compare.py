"""Base against tuned over the same held-out chats."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from phinetune.config import EvaluationSection
from phinetune.data.build import ChatSet
from phinetune.data.chat import Encoded, Encoder
from phinetune.data.packing import pack
from phinetune.evaluation import metrics
from phinetune.measures import MEASURES, Measure
from phinetune.model.generate import Answer, answer_prompts
from phinetune.model.load import has_packed_form
from phinetune.model.scoring import IGNORED, Score, score_batch


@dataclass(frozen=True)
class Held:
    """What one model did on the held-out chats. Rates are in percent, the loss in nats a labelled token."""

    loss: float
    perplexity: float
    token_accuracy: float
    labelled_tokens: int
    prompts: int = 0
    rouge_l: float | None = None
    chrf: float | None = None
    exact_match: float | None = None
    stopped: float | None = None


@dataclass(frozen=True)
class Example:
    """One held-out prompt (its last user turn), the reference, and what was answered by whom."""

    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Results by model (`base`, `tuned`), every answered prompt, and what became of the held-out rows."""

    results: dict[str, Held]
    examples: list[Example]
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {name: asdict(held) for name, held in self.results.items()}


def compare(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    held_out: ChatSet,
    section: EvaluationSection,
    console: Console,
) -> Comparison:
    """Score and question the model without and with its adapter; a model without one is `base` alone."""
    tuned = hasattr(model, "disable_adapter")
    sides: dict[str, Callable[[], Any]] = {"base": model.disable_adapter if tuned else contextlib.nullcontext}
    if tuned:
        sides["tuned"] = contextlib.nullcontext
    questions = _questions(encoder, held_out, section) if section.generate else []
    model.eval()
    results: dict[str, Held] = {}
    answers: dict[str, list[Answer]] = {}
    asked = f" and letting {' and '.join(sides)} answer {len(questions)} prompts" if questions else ""
    console.print(f"Scoring {len(held_out)} held-out chats{asked} …", highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, side in sides.items():
            task = progress.add_task(f"evaluating {name}", total=len(held_out) + len(questions))
            advance = partial(progress.advance, task)
            with side():
                score = score_rows(model, tokenizer, held_out.encoded, section.batch_size, advance)
                answers[name] = answer_prompts(
                    model,
                    tokenizer,
                    [ids for ids, _, _ in questions],
                    max_new_tokens=section.max_new_tokens,
                    batch_size=section.batch_size,
                    on_done=advance,
                )
            results[name] = _held(score, answers[name], [reference for _, _, reference in questions])
    examples = [
        Example(prompt, reference, {name: made[i].text for name, made in answers.items()})
        for i, (_, prompt, reference) in enumerate(questions)
    ]
    return Comparison(results, examples, held_out.report.to_dict())


def score_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    batch_size: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> Score:
    """The score over all labelled tokens, rows of like length together."""
    order = sorted(rows, key=lambda row: len(row.input_ids))
    total = Score()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        total = total + score_batch(model, _batched(batch, tokenizer.pad_token_id, model))
        on_done(len(batch))
    return total


def _batched(rows: Sequence[Encoded], pad: int, model: Any) -> dict[str, torch.Tensor]:
    if not has_packed_form(model):
        return _pad(rows, pad, model.device)
    return {key: value.to(model.device) for key, value in pack(rows).items()}


def _pad(rows: Sequence[Encoded], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(row.input_ids) for row in rows)

    def padded(lists: Sequence[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([values + [filler] * (width - len(values)) for values in lists], device=device)

    return {
        "input_ids": padded([row.input_ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }


def _questions(encoder: Encoder, held_out: ChatSet, section: EvaluationSection) -> list[tuple[list[int], str, str]]:
    """(prompt ids, last user turn, reference) for the last assistant turn of each chat."""
    questions = []
    for chat in held_out.chats[: section.max_prompts]:
        last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
        asked = next((m["content"] for m in reversed(chat[:last]) if m["role"] == "user"), "")
        questions.append((encoder.prompt_ids(chat[:last]), asked, chat[last]["content"]))
    return questions


def _held(score: Score, answers: Sequence[Answer], references: Sequence[str]) -> Held:
    plain = Held(score.loss, score.perplexity, 100 * score.token_accuracy, score.tokens)
    if not answers:
        return plain
    texts = [answer.text for answer in answers]
    return Held(
        plain.loss,
        plain.perplexity,
        plain.token_accuracy,
        plain.labelled_tokens,
        prompts=len(answers),
        rouge_l=metrics.rouge_l(texts, references),
        chrf=metrics.chrf(texts, references),
        exact_match=metrics.exact_match(texts, references),
        stopped=100 * sum(answer.stopped for answer in answers) / len(answers),
    )


def show_comparison(comparison: Comparison, console: Console) -> None:
    """The results as a table, a column a model, and what changed."""
    results = comparison.results
    one = next(iter(results.values()))
    prompts = f", {one.prompts} prompts answered" if one.prompts else ""
    console.print(f"Held-out chats ({one.labelled_tokens:,} labelled tokens{prompts}):", highlight=False)
    table = Table()
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    if len(results) == 2:
        table.add_column("change", justify="right")
    for measure in MEASURES:
        values = [getattr(held, measure.key) for held in results.values()]
        if None not in values:
            table.add_row(measure.heading, *(measure.form.format(v) for v in values), *_change(measure, values))
    console.print(table)


def _change(measure: Measure, values: Sequence[float]) -> list[str]:
    if len(values) != 2:
        return []
    text, better = measure.change(*values)
    if values[0] == values[1]:
        return [text]
    return [f"[{'green' if better else 'red'}]{text}[/]"]
