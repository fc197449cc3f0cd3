"""Ten small sets of unlike tasks, for the benchmark of data curves: the demo's chats, Alpaca's rows, and made ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

TRAIN, HELD_OUT = 192, 64  # rows of each set
LONGEST = 300  # letters of an Alpaca answer, so that a set takes minutes
ALPACA = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_en_demo.json"
Row = tuple[str, str]

SYLLABLES = ("ba", "ko", "mi", "tu", "re", "sha", "lo", "ni", "pe", "zu")
NAMES = ("Ada", "Bruno", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kira", "Lars")
CITIES = ("Lyon", "Oslo", "Porto", "Graz", "Turku", "Bergen", "Malmo", "Gdansk", "Split", "Varna")
ITEMS = ("tent", "lamp", "rope", "stove", "jacket", "compass", "kettle", "sleeping bag", "map", "boots")
TROUBLES = {
    "billing": ("I was charged twice for the {0}.", "The invoice for my {0} shows a wrong sum.", "Where is my refund?"),
    "delivery": ("My {0} has not arrived.", "The parcel with the {0} went to {1}.", "When will the {0} be in {1}?"),
    "defect": ("The {0} broke on the first day.", "A part of the {0} is missing.", "The {0} leaks in the rain."),
    "praise": ("The {0} is wonderful, thank you.", "Great service in {1}!", "I love my new {0}."),
}


def demo(_: random.Random) -> list[Row]:
    """The bundled chats of an outdoor-gear shop."""
    text = files("phinetune.demo_data").joinpath("train.jsonl").read_text(encoding="utf-8")
    chats = [json.loads(line)["messages"] for line in text.splitlines()]
    return [(chat[-2]["content"], chat[-1]["content"]) for chat in chats]


def alpaca(_: random.Random) -> list[Row]:
    """Instructions of many kinds, with short answers."""
    rows = json.loads(ALPACA.read_text(encoding="utf-8"))
    short = [row for row in rows if len(row["output"]) <= LONGEST and len(row["input"]) <= LONGEST]
    return [("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in short]


def classes(rng: random.Random) -> list[Row]:
    """Messages of customers, sorted into four classes."""
    kinds = list(TROUBLES)
    return [
        (rng.choice(TROUBLES[kind]).format(rng.choice(ITEMS), rng.choice(CITIES)), kind)
        for kind in (rng.choice(kinds) for _ in range(TRAIN + HELD_OUT))
    ]


def to_json(rng: random.Random) -> list[Row]:
    """An order in words, as JSON."""
    rows = []
    for _ in range(TRAIN + HELD_OUT):
        name, city, item, count = rng.choice(NAMES), rng.choice(CITIES), rng.choice(ITEMS), rng.randint(1, 9)
        asked = f"{name} from {city} orders {count} of the item {item}."
        rows.append((asked, json.dumps({"name": name, "city": city, "item": item, "count": count})))
    return rows


def sums(rng: random.Random) -> list[Row]:
    """Sums of two numbers."""
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(TRAIN + HELD_OUT)]
    return [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


def translation(rng: random.Random) -> list[Row]:
    """Sentences in a made language, whose words have to be learnt."""
    words = [*NAMES, *CITIES, *ITEMS, "likes", "sells", "finds"]
    known = {word: "".join(rng.choices(SYLLABLES, k=3)) for word in words}
    rows = []
    for _ in range(TRAIN + HELD_OUT):
        parts = [rng.choice(NAMES), rng.choice(("likes", "sells", "finds")), rng.choice(ITEMS), rng.choice(CITIES)]
        english = f"{parts[0]} {parts[1]} a {parts[2]} in {parts[3]}."
        rows.append((f"Translate into Kemi: {english}", f"{known[parts[3]]} {' '.join(known[p] for p in parts[:3])}"))
    return rows


def style(rng: random.Random) -> list[Row]:
    """Plain sentences in the voice of a ship's captain."""
    ends = ("Steady as she goes.", "Mind the tide.", "So says the log.", "Trim the sails.")
    rows = []
    for _ in range(TRAIN + HELD_OUT):
        item, city, name = rng.choice(ITEMS), rng.choice(CITIES), rng.choice(NAMES)
        end = ends[(len(item) + len(city)) % len(ends)]
        rows.append((f"{name} needs a {item} in {city}.", f"Ahoy! {name} be wanting a {item}, port of {city}. {end}"))
    return rows


def reversal(rng: random.Random) -> list[Row]:
    """Words in the reverse order."""
    words = [*NAMES, *CITIES, *ITEMS[:3]]
    some = [rng.sample(words, rng.randint(3, 6)) for _ in range(TRAIN + HELD_OUT)]
    return [(f"Reverse: {' '.join(one)}", " ".join(reversed(one))) for one in some]


def dates(rng: random.Random) -> list[Row]:
    """Dates in words, as numbers."""
    names = "January February March April May June July August September October November December"
    months = names.split()
    rows = []
    for _ in range(TRAIN + HELD_OUT):
        day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2030)
        rows.append((f"Write as ISO: {months[month]} {day}, {year}", f"{year}-{month + 1:02d}-{day:02d}"))
    return rows


def facts(rng: random.Random) -> list[Row]:
    """Questions about made people. The facts are few, so they are learnt the better the oftener they are asked."""
    homes = {name: (rng.choice(CITIES), rng.choice(ITEMS)) for name in NAMES}
    rows = []
    for _ in range(TRAIN + HELD_OUT):
        name, about = rng.choice(NAMES), rng.randrange(2)
        asked = (f"Where does {name} live?", f"What did {name} buy?")[about]
        greeting = rng.choice(("", "Please tell me: ", "Quick question. ", "Hello! "))
        rows.append((greeting + asked, (f"In {homes[name][0]}.", f"A {homes[name][1]}.")[about]))
    return rows


SETS: dict[str, Callable[[random.Random], list[Row]]] = {
    one.__name__: one for one in (demo, alpaca, classes, to_json, sums, translation, style, reversal, dates, facts)
}


def write_set(name: str, folder: Path, train: int = TRAIN, held_out: int = HELD_OUT) -> tuple[Path, Path]:
    """Write a set's training rows and held-out rows; the same rows every time."""
    rng = random.Random(name)
    rows = SETS[name](rng)
    rng.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files_ = folder / f"{name}.jsonl", folder / f"{name}-held-out.jsonl"
    for file, some in zip(files_, (rows[:train], rows[train : train + held_out]), strict=True):
        file.write_text("".join(json.dumps(_chat(*row)) + "\n" for row in some), encoding="utf-8")
    return files_


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
