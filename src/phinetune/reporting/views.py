"""What the page's templates show of a run: rows of tables, lines of text, marked answers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from phinetune.durations import spell_seconds
from phinetune.metric_table import LOSS, Measure, measured
from phinetune.reporting.curves import GIB, last_values
from phinetune.reporting.facts import RunFacts
from phinetune.reporting.headline import UNCLEAR, interval, measure_beside_loss
from phinetune.reporting.marking import Marked, MarkedText, mark
from phinetune.secret_text import tree_without_secrets

ANSWERS = 20  # most held-out prompts that are shown
RECENT = 20  # newest log entries from which the remaining time is estimated


class ResultRow(NamedTuple):
    """One measure.

    Attributes:
        values: one for each model, as text.
        change: from base to tuned; empty if only one model was measured.
        verdict: better, worse or unclear; empty if nothing changed, or if only one model was measured.
        interval: the interval of the change; empty if the paired bootstrap gave none.
        bar: the values in percent, for the ends of a bar; None if they are not in percent.
    """

    heading: str
    values: list[str]
    change: str = ""
    verdict: str = ""
    interval: str = ""
    bar: tuple[float, float] | None = None


def result_rows(evaluated: Mapping[str, Any]) -> list[ResultRow]:
    """One row for each measure that every model has. `evaluated` is results.json or evaluation.json."""
    sides = evaluated.get("evaluation") or {}
    differences = evaluated.get("differences") or {}
    return [
        _result_row(measure, [side[measure.key] for side in sides.values()], differences.get(measure.key))
        for measure in measured(sides, evaluated.get("own"))
    ]


def _result_row(measure: Measure, values: list[float], difference: Mapping[str, Any] | None) -> ResultRow:
    shown = [measure.amount(value) for value in values]
    if len(values) != 2:
        return ResultRow(measure.titled, shown)
    change, better = measure.change(*values)
    verdict = "" if values[0] == values[1] else "better" if better else "worse"
    ends = interval(measure, difference or {})
    if difference:
        verdict = "unclear" if difference.get("verdict") == UNCLEAR else str(difference.get("verdict", verdict))
    bar = (values[0], values[1]) if measure.is_percent and all(0 <= value <= 100 for value in values) else None
    return ResultRow(measure.titled, shown, change.replace("-", "−"), verdict, ends, bar)


def answer_lengths(evaluated: Mapping[str, Any]) -> str:
    """How many words an answer of each model has, where held-out rows are pairs; else empty."""
    sides = evaluated.get("evaluation") or {}
    counts = {name: numbers.get("answer_words") for name, numbers in sides.items()}
    if not counts or any(count is None for count in counts.values()):
        return ""
    return "Words an answer: " + ", ".join(f"{name} {count:.1f}" for name, count in counts.items())


class TagTable(NamedTuple):
    """Results for each value of the tag column, with two columns for each measure: base and tuned."""

    headings: list[str]
    rows: list[tuple[str, list[str]]]


def tag_table(run: RunFacts) -> TagTable | None:
    """The table of results by tag. None if the chats had no tags, or if only one model was measured."""
    tags, sides = run.evaluated.get("by_tag") or {}, run.comparison
    if not tags or not {"base", "tuned"} <= sides.keys():
        return None
    told = [m for m in (measure_beside_loss(run.evaluated), LOSS) if m]
    rows = [
        (str(tag), [f"{part.get('rows', 0):,}", *(_of(part.get(s), m) for m in told for s in ("base", "tuned"))])
        for tag, part in tags.items()
    ]
    return TagTable(
        ["chats", *(f"{m.heading.partition(' (')[0]}, {side}" for m in told for side in ("base", "tuned"))], rows
    )


def _of(side: Mapping[str, Any] | None, measure: Measure) -> str:
    value = (side or {}).get(measure.key)
    return measure.amount(value) if isinstance(value, (int, float)) else "—"


def hard_kinds(evaluated: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The kinds of rows that were learnt worst. `evaluated` is results.json or evaluation.json."""
    kinds = (evaluated.get("hard") or {}).get("kinds") or []
    return [
        (
            f"{one['by']}: {one['name']}",
            [
                f"{one['rows']:,}",
                *(LOSS.amount(one[side]) for side in ("base", "loss")),
                LOSS.amount(one["above"], sign=True),
                f"{LOSS.amount(one['low'], sign=True)} to {LOSS.amount(one['high'], sign=True)}",
                *([LOSS.amount(-one["last_doubling"], sign=True)] if "last_doubling" in one else []),
            ],
        )
        for one in kinds
    ]


def field_rows(run: RunFacts) -> list[tuple[str, list[str]]]:
    """For each JSON field, the percentage of right values for each model. Empty if the answers are not JSON."""
    by_model = run.evaluated.get("json_fields") or {}
    fields = dict.fromkeys(name for shares in by_model.values() for name in shares)
    return [
        (name, [f"{shares[name]:.1f}" if name in shares else "—" for shares in by_model.values()]) for name in fields
    ]


class Cell(NamedTuple):
    """A count in a confusion matrix, and how dark it is: 0, 1 or 2, by its share of the row."""

    text: str
    level: int


class ClassTables(NamedTuple):
    """What a metric that sorts answers into classes found.

    Attributes:
        headings, rows: of the table of classes.
        columns: the headings of the matrices: the labels, and a last one for answers that name none.
        matrices: (model, rows) pairs; each row has the label of the chats' own answers and a cell a column.
    """

    name: str
    headings: list[str]
    rows: list[tuple[str, list[str]]]
    columns: list[str]
    matrices: list[tuple[str, list[tuple[str, list[Cell]]]]]


SHOWN_SCORES = {"precision": "precision %", "recall": "recall %", "f1": "F1 %"}


def class_tables(evaluated: Mapping[str, Any]) -> list[ClassTables]:
    """The tables of each metric that sorts answers into classes. `evaluated` is results.json or evaluation.json."""
    return [_class_tables(name, tree) for name, tree in (evaluated.get("classes") or {}).items()]


def _class_tables(name: str, tree: Mapping[str, Any]) -> ClassTables:
    labels, sides = [str(label) for label in tree["labels"]], tree["sides"]
    scores = [side["scores"] for side in sides.values()]
    rows = [
        (label, [f"{scores[0][i]['support']:,}", *(f"{one[i][what]:.1f}" for what in SHOWN_SCORES for one in scores)])
        for i, label in enumerate(labels)
    ]
    return ClassTables(
        name.replace("_", " "),
        ["prompts", *(f"{shown}, {side}" for shown in SHOWN_SCORES.values() for side in sides)],
        rows,
        [*labels, "none of them"],
        [(side, list(zip(labels, map(_cells, found["matrix"]), strict=True))) for side, found in sides.items()],
    )


def _cells(counts: Sequence[int]) -> list[Cell]:
    total = max(1, sum(counts))
    return [Cell(f"{count:,}", (10 * count >= total) + (2 * count >= total)) for count in counts]


def kept_rows(evaluated: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """For all neutral chats and for each tag: how many there are, and the loss of base and tuned model."""
    kept = evaluated.get("kept") or {}
    if not kept:
        return []
    parts = {"all": {"rows": kept["rows"], **kept["results"]}, **kept["by_tag"]}
    loss = LOSS
    return [
        (tag, [f"{part['rows']:,}", *(_of(part.get(side), loss) for side in ("base", "tuned"))])
        for tag, part in parts.items()
    ]


class MarkedAnswer(NamedTuple):
    """One model's answer, twice: differences from the other model's answer marked, and from the reference."""

    model: str
    against_other: Marked
    against_reference: Marked
    exact: bool


class ShownPrompt(NamedTuple):
    """A held-out prompt, its reference, and the models' answers."""

    prompt: str
    reference: str
    answers: list[MarkedAnswer]


def answered_prompts(examples: Sequence[Mapping[str, Any]]) -> list[ShownPrompt]:
    """The first `ANSWERS` prompts that were answered."""
    return [
        ShownPrompt(str(example.get("prompt", "")), str(example.get("reference", "")), _marked_answers(example))
        for example in examples[:ANSWERS]
    ]


def default_comparison(prompts: Sequence[ShownPrompt]) -> str:
    """What the page compares answers with until the reader chooses: `other`, the other model's answers.

    If more than half of the answers differ throughout, it is `reference`. They do so if the base does not know the
    task.
    """
    answers = [answer for one in prompts for answer in one.answers]
    different = sum(answer.against_other.throughout for answer in answers)
    return "reference" if 2 * different > len(answers) else "other"


def _marked_answers(example: Mapping[str, Any]) -> list[MarkedAnswer]:
    answers = {model: str(text) for model, text in (example.get("answers") or {}).items()}
    reference = str(example.get("reference", ""))
    made = []
    for model, text in answers.items():
        others = [other for name, other in answers.items() if name != model]
        against_other = mark(text, others[0]) if len(others) == 1 else Marked([MarkedText(text, False)], False)
        made.append(MarkedAnswer(model, against_other, mark(text, reference), text.strip() == reference.strip()))
    return made


class SampledPrompt(NamedTuple):
    """A fixed prompt that the model answered at each evaluation during training.

    Attributes:
        answers: (step, answer, whether the answer ended by itself) for each evaluation.
    """

    prompt: str
    reference: str
    answers: list[tuple[int, str, bool]]


def sampled_prompts(run: RunFacts) -> list[SampledPrompt]:
    """The fixed prompts, with what the model answered while it trained."""
    found: dict[str, SampledPrompt] = {}
    for sample in run.samples:
        prompt = str(sample.get("prompt", ""))
        held = found.setdefault(prompt, SampledPrompt(prompt, str(sample.get("reference", "")), []))
        held.answers.append((int(sample["step"]), str(sample.get("answer", "")), bool(sample.get("stopped", True))))
    return list(found.values())


def state_line(run: RunFacts) -> str:
    """The state in words: `finished`, `running: step 8 of 45, about 3m 10s left` or `stopped at step 8 of 45`."""
    done, planned = run.steps
    place = f"step {done:,} of {planned:,}" if planned else f"step {done:,}"
    if run.state == "running":
        left = seconds_left(run)
        return f"running: {place}" + (f", about {spell_seconds(left)} left" if left is not None else "")
    return f"stopped at {place}" if run.state == "stopped" else "finished"


def seconds_left(run: RunFacts) -> float | None:
    """The remaining time of training, estimated from the newest log entries. None before there are two entries."""
    done, planned = run.steps
    timed = [(entry["time"], entry["step"]) for entry in run.entries if "time" in entry and "loss" in entry][-RECENT:]
    if not planned or len(timed) < 2 or timed[-1][1] == timed[0][1]:
        return None
    return float((timed[-1][0] - timed[0][0]) / (timed[-1][1] - timed[0][1]) * (planned - done))


def summary_items(run: RunFacts) -> list[tuple[str, str]]:
    """(name, value) pairs for the row of numbers under the headline."""
    training, newest = run.results.get("training") or {}, run.entries[-1] if run.entries else {}
    done, planned = run.steps
    complete = done == planned or not planned
    items = [("steps", f"{done:,}" if complete else f"{done:,} of {planned:,}")]
    epochs = training.get("epochs") or newest.get("epoch")
    tokens = training.get("tokens") or max(last_values(run.entries, "tokens", 1), default=None)
    memory = max(last_values(run.entries, "memory", len(run.entries)), default=None)
    trains, total = (
        run.start.get("trainable_parameters") or training.get("trainable_parameters"),
        run.start.get("parameters"),
    )
    items += [("epochs", f"{epochs:.2f}")] if epochs else []
    items += [("tokens", f"{int(tokens):,}")] if tokens else []
    items += [("time", spell_seconds(training["seconds"]))] if training.get("seconds") else []
    items += [("peak memory", f"{memory / GIB:.1f} GiB")] if memory else []
    items += [("trainable", f"{trains:,}" + (f" ({trains / total:.2%})" if total else ""))] if trains else []
    return items


SETS = {"train": "training", "held_out": "held out", "test": "test"}


def set_names(run: RunFacts) -> list[str]:
    """What the sets of a run are called, in the order of `data_rows`."""
    return [heading for name, heading in SETS.items() if run.data.get(name)]


def data_rows(sets: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(name of a fact, one value for each set) for the sets that are recorded."""
    present = [sets[name] for name in SETS if sets.get(name)]  # beside them stands what the sets share
    if not present:
        return []
    replay = sets.get("replay")

    def row(name: str, key: str) -> tuple[str, list[str]]:
        return name, [f"{report.get(key, 0):,}" for report in present]

    share = [
        f"{r.get('trainable_tokens', 0):,} ({r.get('trainable_tokens', 0) / max(1, r.get('tokens', 0)):.0%})"
        for r in present
    ]
    return [
        ("source", [str(report.get("source", "")) for report in present]),
        ("form of the rows", [_counts(report.get("forms")) for report in present]),
        row("rows", "rows"),
        row("chats kept", "kept"),
        row("cut to fit", "cut"),
        ("dropped", [_counts(report.get("dropped")) or "0" for report in present]),
        ("columns not used", [_counts(r.get("unused", {}) | r.get("unused_values", {})) for r in present]),
        row("tokens", "tokens"),
        ("tokens trained on or scored", share),
        row("longest chat, tokens", "longest"),
        *([("answers of the base mixed in", [f"{replay['rows']:,}", *[""] * (len(present) - 1)])] if replay else []),
    ]


def _counts(counted: Any) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in (counted or {}).items())


def as_yaml(tree: Any) -> str:
    """A section of the configuration as YAML, as in its file."""
    return str(yaml.safe_dump(tree_without_secrets(tree or {}), sort_keys=False, allow_unicode=True, width=80)).strip()


def commands(run: RunFacts) -> list[tuple[str, str]]:
    """(what a command does, the command) for the next steps with this run."""
    place = shlex.quote(str(run.path))
    if run.state != "finished":
        return [
            ("see it live while it trains", f"phinetune watch {place}"),
            ("go on after a stop", f"phinetune train {place}/config.yaml --resume"),
        ]
    return [
        ("talk to it", f"phinetune chat {place}"),
        ("one answer", f'phinetune generate {place} --prompt "…"'),
        ("compare it with its base on other chats", f"phinetune evaluate {place} --data FILE"),
        ("a merged model for transformers", f"phinetune merge {place} --out {place}-merged"),
        ("for llama.cpp", f"phinetune export {place} --to gguf --type q8_0"),
        ("this page again", f"phinetune report {place}"),
    ]
