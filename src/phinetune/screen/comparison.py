"""A comparison on the terminal: a column a model, what changed, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phinetune.evaluation.bootstrap import LEVEL, NOT_FINITE
from phinetune.evaluation.compare import Comparison
from phinetune.metric_table import LESS_TOLD, Measure, measured

TAGS = 12  # values of the tag column that are shown
CLASSES = 12


def show_comparison(comparison: Comparison, console: Console, chats: str = "Held-out chats") -> None:
    """The results as a table, by tag as well where there are tags, and what should be looked at.

    Args:
        chats: what the chats are called that were measured.
    """
    one = next(iter(comparison.results.values()))
    prompts = f", {one['prompts']} prompts answered" if one["prompts"] else ""
    console.print(f"{chats} ({one['labelled_tokens']:,} labelled tokens{prompts}):", highlight=False)
    console.print(_results(comparison))
    if comparison.json_fields:
        console.print(_fields(comparison.json_fields))
    for name, tree in comparison.classes.items():
        console.print(_classes(name, tree))
    if comparison.by_tag:
        console.print(_tags(comparison))
    words = [
        f"{name} {numbers['answer_words']:.1f}"
        for name, numbers in comparison.results.items()
        if numbers.get("answer_words")
    ]
    if words:
        console.print(f"Words an answer: {', '.join(words)}", highlight=False)
    if comparison.win_rate:
        console.print(f"Win rate: {comparison.win_rate['text']}", markup=False, highlight=False, soft_wrap=True)
    if comparison.since_start:
        _show_since_start(comparison.since_start, console)
    for judged in comparison.judged.values():
        console.print(f"Judge: {judged['text']}", markup=False, highlight=False, soft_wrap=True)
        for line in judged["look"]:
            console.print(f"Look: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for flag in comparison.flags:
        console.print(f"Look: {flag}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _show_since_start(since: Comparison, console: Console) -> None:
    console.print("Since the start, the adapter that this run went on from:", highlight=False)
    console.print(_results(since))
    if since.win_rate:
        console.print(f"Win rate: {since.win_rate['text']}", markup=False, highlight=False, soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _results(comparison: Comparison) -> Table:
    results = comparison.results
    paired = len(results) == 2
    measures = measured(results, comparison.own)
    table = _table("", *results, *(["change", f"{LEVEL}% interval"] if paired else []))
    if paired:
        table.add_column("")
    for measure in measures:
        values = [numbers[measure.key] for numbers in results.values()]
        cells = [measure.amount(value) for value in values]
        table.add_row(measure.titled, *cells, *(_changed(comparison, measure, values) if paired else []))
    table.caption = LESS_TOLD
    return table


def _changed(comparison: Comparison, measure: Measure, values: list[float]) -> list[str | Text]:
    difference = comparison.differences.get(measure.key)
    text = measure.change(*values)[0]
    if difference is None:
        return [text, "", ""]
    if difference.verdict == NOT_FINITE:
        return [text, "", NOT_FINITE]
    interval = f"{measure.amount(difference.low, sign=True)} to {measure.amount(difference.high, sign=True)}"
    colour = {"better": "green", "worse": "red"}.get(difference.verdict)
    return [Text(text, style=colour or ""), interval, difference.verdict]


def _fields(shares: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("JSON field right %", *shares)
    for key in dict.fromkeys(key for side in shares.values() for key in side):
        table.add_row(key, *(f"{side[key]:.1f}" for side in shares.values()))
    return table


def _classes(name: str, tree: Mapping[str, Any]) -> Table:
    """How well each class was told, for each model. The confusion matrix stands in the report."""
    sides = tree["sides"]
    table = _table(f"{name}: class", "prompts", *(f"{what}, {side}" for what in ("recall %", "F1 %") for side in sides))
    for i, label in enumerate(tree["labels"][:CLASSES]):
        scores = [side["scores"][i] for side in sides.values()]
        cells = [f"{one[what]:.1f}" for what in ("recall", "f1") for one in scores]
        table.add_row(label, str(scores[0]["support"]), *cells)
    if len(tree["labels"]) > CLASSES:
        table.caption = f"and {len(tree['labels']) - CLASSES} more classes"
    return table


def _tags(comparison: Comparison) -> Table:
    """By tag the loss, and the first metric of answers."""
    measures = [m for m in measured(comparison.results, comparison.own) if m.key == "loss" or m.kind != "scored"][:2]
    names = list(comparison.results)
    table = _table("tag", "rows", *(f"{m.heading.split(' (')[0]}, {name}" for m in measures for name in names))
    for tag, found in list(comparison.by_tag.items())[:TAGS]:
        cells = [_cell(measure, found[name]) for measure in measures for name in names]
        table.add_row(tag or "(none)", str(found["rows"]), *cells)
    if len(comparison.by_tag) > TAGS:
        table.caption = f"and {len(comparison.by_tag) - TAGS} more tags"
    return table


def _cell(measure: Measure, numbers: Mapping[str, Any]) -> str:
    value = numbers.get(measure.key)
    return "–" if value is None else measure.amount(value)
