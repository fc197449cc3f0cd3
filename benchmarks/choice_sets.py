"""The six sets of `benchmarks.choices`: chats that differ in task, form of answer and size.

Answers of the rows that are made here can't be told for certain, but for sums, as people's rows can't: somebody's
guess, a synonym. A loss that could fall to nothing would differ by large shares between runs that are all perfect.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "phinetune" / "demo_data"
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
HELD_OUT = 48  # rows of a set that a run's own evaluations score
FRESH = 400  # rows at most that only the figures come from
Row = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """A set's rows: what is trained on, what the run scores itself, and what the figure comes from."""

    train: list[Row]
    held_out: list[Row]
    fresh: list[Row]


def parts_of(name: str) -> Parts:
    """The rows of a set, always the same. No question stands in two parts, as far as rows are made here."""
    draw = random.Random(name)
    make, trained = SETS[name]
    rows = make(draw)
    draw.shuffle(rows)
    end = trained + HELD_OUT
    return Parts(rows[:trained], rows[trained:end], rows[end : end + FRESH])


def chat(question: str, answer: str) -> Row:
    """A row in OpenAI's form."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def demo(draw: random.Random) -> list[Row]:
    """Answers of a shop: the demo's chats."""
    return [json.loads(line) for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def alpaca(draw: random.Random) -> list[Row]:
    """Instructions with short answers, of ../shared/data."""
    return [row for row in json.loads(ALPACA.read_text(encoding="utf-8")) if len(row["output"]) < 300]


def arithmetic(draw: random.Random) -> list[Row]:
    """Sums and differences of two small numbers. Of larger ones some hundred rows teach nothing but by heart."""
    asked = [*itertools.product(range(2, 31), range(2, 31), (True, False))]
    return [
        chat(f"{a} {'+' if plus else '-'} {b}", f"= {a + b if plus else a - b}")
        for a, b, plus in draw.sample(asked, 1000)
    ]


def classes(draw: random.Random) -> list[Row]:
    """Sorting messages to a helpdesk into four classes, by people who sort one in nine otherwise."""
    kinds = {
        "billing": ["I was charged twice", "The invoice is wrong", "My card was refused", "I want a refund"],
        "login": ["I can't sign in", "My password is not accepted", "The code never comes", "I am locked out"],
        "delivery": ["My parcel is late", "The box was empty", "It went to a neighbour", "Where is my order"],
        "other": ["Do you have a shop in Bern", "Who writes your blog", "Are you hiring", "I like your colours"],
    }
    starts = ["", "Hello. ", "Good morning! ", "To whom it may concern: ", "Sorry, me again. "]
    ends = ["", " since Monday.", ", please help.", " again!", " and nobody answers.", "; what now?", ", as last year."]
    ends += [", I wrote twice.", " (see the picture).", ", thanks."]
    texts = [
        (f"{start}{text}{end}", kind)
        for kind, texts in kinds.items()
        for start, text, end in itertools.product(starts, texts, ends)
    ]
    return [chat(text, kind if draw.random() < 6 / 7 else draw.choice(list(kinds))) for text, kind in texts]


def as_json(draw: random.Random) -> list[Row]:
    """Notes of orders as JSON; how urgent one is was somebody's guess."""
    people, things = ["Ana", "Bo", "Cem", "Dina", "Eli"], ["tent", "lamp", "rope", "stove", "boots"]
    rows = []
    for who, what, count, day in draw.sample([*itertools.product(people, things, range(1, 10), range(1, 29))], 1000):
        note = f"{who} would like {count} of the {what}, by the {day}th."
        urgency = draw.choices(["low", "normal", "high"], [6, 3, 1] if day > 10 else [1, 3, 6])[0]
        record = {"name": who.lower(), "item": what, "count": count, "day": day, "urgency": urgency}
        rows.append(chat(note, json.dumps(record)))
    return rows


def translation(draw: random.Random) -> list[Row]:
    """Short sentences from English to German, by several translators: most words have two."""
    who = {
        "The child": ["Das Kind", "Das Kleine"],
        "The dog": ["Der Hund"],
        "My sister": ["Meine Schwester"],
        "The baker": ["Der Bäcker", "Der Bäckermeister"],
        "Our teacher": ["Unsere Lehrerin", "Unser Lehrer"],
        "The neighbour": ["Der Nachbar", "Die Nachbarin"],
        "A student": ["Ein Student", "Eine Studentin"],
    }
    does = {
        "sees": ["sieht", "erblickt"],
        "buys": ["kauft", "erwirbt"],
        "paints": ["malt"],
        "loses": ["verliert", "verlegt"],
        "carries": ["trägt"],
        "finds": ["findet", "entdeckt"],
        "shows": ["zeigt", "präsentiert"],
        "keeps": ["behält", "verwahrt"],
    }
    what = {
        "a red car": ["ein rotes Auto", "einen roten Wagen"],
        "the bread": ["das Brot"],
        "an old book": ["ein altes Buch", "einen alten Band"],
        "a key": ["einen Schlüssel"],
        "the picture": ["das Bild", "das Gemälde"],
        "a small box": ["eine kleine Kiste", "eine kleine Schachtel"],
        "the letter": ["den Brief", "das Schreiben"],
        "two apples": ["zwei Äpfel"],
    }
    return [
        chat(f"{a} {b} {c}.", f"{draw.choice(who[a])} {draw.choice(does[b])} {draw.choice(what[c])}.")
        for a, b, c in itertools.product(who, does, what)
    ]


SETS: dict[str, tuple[Callable[[random.Random], list[Row]], int]] = {
    "demo": (demo, 120),
    "alpaca": (alpaca, 100),
    "arithmetic": (arithmetic, 400),
    "classes": (classes, 400),
    "json": (as_json, 100),
    "translation": (translation, 100),
}
