"""Writes the bundled demo data set: customer messages to an outdoor-gear shop, with exact answers.

    python tools/make_demo_data.py

Every answer follows from its message by plain rules, so a fine-tuned model can be scored by exact match.
The held-out chats use (product, problem) pairs which the training chats never show together.

Beside them it writes the data of the demo of preferences. In styles.jsonl, for supervised fine-tuning, a coin decides
in which of two styles a last answer is written. In pairs.jsonl and pairs_heldout.jsonl the signed style is chosen.
"""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from pathlib import Path

SEED = 20
TRAIN_CHATS = 420
HELDOUT_CHATS = 80
MULTI_TURN_SHARE = 0.15
FOLDER = Path(__file__).resolve().parent.parent / "src" / "phinetune" / "demo_data"

SYSTEM = "Answer for Trailhead Outfitters: a friendly line, then JSON."
ASK_FOR_ORDER = "Happy to help! Which order is it?"
LINE = "Sorry about the {problem}, we are on it!"
SIGNED = "Thanks for telling us about the {problem}. Your Trailhead team"
STYLES_CHATS = 300  # the first of the training chats; the others become pairs

# Canonical name -> how customers call it.
PRODUCTS = {
    "rain jacket": ("rain jacket", "raincoat", "waterproof jacket"),
    "down jacket": ("down jacket", "down coat"),
    "hiking boots": ("hiking boots", "walking boots", "boots"),
    "backpack": ("backpack", "rucksack"),
    "tent": ("tent", "two-person tent"),
    "sleeping bag": ("sleeping bag", "winter sleeping bag"),
    "sleeping mat": ("sleeping mat", "sleeping pad"),
    "headlamp": ("headlamp", "head torch"),
    "camp lantern": ("camp lantern", "lantern"),
    "camp stove": ("camp stove", "gas stove", "stove"),
    "water bottle": ("water bottle", "drinking bottle"),
    "trekking poles": ("trekking poles", "hiking poles"),
    "GPS watch": ("GPS watch", "sports watch"),
    "hammock": ("hammock", "camping hammock"),
}

# Canonical name -> how customers put it. No wording has to agree with a singular or plural product.
PROBLEMS = {
    "zip damage": (
        "the zip on my {product} broke",
        "the zipper of the {product} came apart",
        "the zip on the {product} jams every time",
        "I can't zip up my {product}, the slider came off",
        "the teeth of my {product} no longer lock together",
    ),
    "seam damage": (
        "a seam on my {product} tore",
        "the stitching of the {product} came undone",
        "my {product} split along the stitches",
        "the {product} ripped open at the seam",
        "threads on my {product} came loose and left a gap",
    ),
    "water leak": (
        "there is a water leak in my {product}",
        "my {product} leaked on the first day",
        "water got through the {product}",
        "my {product} did not stay watertight",
        "all my things got wet because of the {product}",
    ),
    "wrong size": (
        "my {product} came in the wrong size",
        "the {product} turned out far too small",
        "the {product} came out two sizes too big",
        "I picked large for the {product} and got small",
        "I got the {product} in M, not in XL",
    ),
    "wrong colour": (
        "my {product} came in the wrong colour",
        "I picked green for the {product} and got red",
        "I got the {product} in blue, not in grey",
        "I wanted the {product} in black but got orange",
        "you sent me the yellow {product} and I chose brown",
    ),
    "late delivery": (
        "the delivery of my {product} is late",
        "my {product} never arrived",
        "I am still waiting for my {product}",
        "the parcel with my {product} did not come",
        "the {product} should have been here last week",
    ),
    "missing part": (
        "a part of my {product} was missing",
        "one piece of the {product} was not in the box",
        "my {product} came incomplete",
        "the box with the {product} lacked a piece",
        "I unpacked the {product} and not everything was there",
    ),
    "strap damage": (
        "the strap on my {product} snapped",
        "a strap of the {product} came off",
        "the band on my {product} tore in two",
        "the strap of the {product} gave out",
        "the strap on my {product} broke off",
    ),
    "battery fault": (
        "the battery of my {product} died",
        "my {product} won't turn on",
        "my {product} has no power",
        "the {product} stays dark even after charging",
        "my {product} does not charge any more",
    ),
    "double charge": (
        "I was charged twice for my {product}",
        "you billed the {product} two times",
        "my card shows two payments for the {product}",
        "I paid double for my {product}",
        "I see the {product} twice on my bill",
    ),
}

ANYTHING = ("late delivery", "double charge")
# Problems which make sense for a product, next to those that happen to anything.
POSSIBLE = {
    "rain jacket": ("zip damage", "seam damage", "water leak", "wrong size", "wrong colour"),
    "down jacket": ("zip damage", "seam damage", "wrong size", "wrong colour"),
    "hiking boots": ("seam damage", "water leak", "wrong size", "wrong colour"),
    "backpack": ("zip damage", "seam damage", "strap damage", "wrong size", "wrong colour"),
    "tent": ("zip damage", "seam damage", "water leak", "missing part", "wrong colour"),
    "sleeping bag": ("zip damage", "seam damage", "wrong size", "wrong colour"),
    "sleeping mat": ("strap damage", "missing part", "wrong size", "wrong colour"),
    "headlamp": ("battery fault", "strap damage", "water leak", "missing part"),
    "camp lantern": ("battery fault", "missing part", "water leak", "wrong colour"),
    "camp stove": ("missing part", "wrong size", "wrong colour"),
    "water bottle": ("water leak", "strap damage", "missing part", "wrong size", "wrong colour"),
    "trekking poles": ("strap damage", "missing part", "wrong size", "wrong colour"),
    "GPS watch": ("battery fault", "strap damage", "missing part", "wrong colour"),
    "hammock": ("seam damage", "strap damage", "missing part", "wrong colour"),
}

HELDOUT_PAIRS = (
    ("rain jacket", "zip damage"),
    ("down jacket", "wrong colour"),
    ("down jacket", "double charge"),
    ("hiking boots", "water leak"),
    ("backpack", "strap damage"),
    ("tent", "missing part"),
    ("sleeping bag", "seam damage"),
    ("sleeping bag", "late delivery"),
    ("sleeping mat", "wrong size"),
    ("headlamp", "battery fault"),
    ("camp lantern", "missing part"),
    ("camp stove", "late delivery"),
    ("water bottle", "wrong colour"),
    ("trekking poles", "double charge"),
    ("GPS watch", "strap damage"),
    ("hammock", "seam damage"),
)

URGENCY = {
    "high": (
        "it is urgent, I leave tomorrow",
        "it is urgent, my flight goes tonight",
        "I urgently need it by tomorrow",
        "please hurry, we leave in two days",
        "please hurry, the trip is this weekend",
    ),
    "low": (
        "no hurry",
        "there is no rush",
        "there is no need to hurry",
        "it can wait",
        "it is not urgent",
    ),
    "normal": ("",),
}

GREETINGS = ("", "", "", "Hi!", "Hello.", "Hey there!")
CLOSINGS = ("", "", "", "", "Thanks!", "What now?")
ORDER_FIRST = ("Order {order}:", "Order #{order}.", "About order no. {order}:", "This is about #{order}.")
ORDER_LAST = ("My order number is {order}.", "Order #{order}.", "Order no. {order}.", "(order {order})")
ORDER_REPLY = ("It is {order}.", "Sure, #{order}", "Order no. {order}, thanks!", "The number is {order}.")


def line_and_record(order: str | None, product: str, problem: str, urgency: str) -> str:
    """The assistant's answer: the friendly line, then the record. Without an order number it asks for one."""
    line = ASK_FOR_ORDER if order is None else LINE.format(problem=problem)
    record = {"order": order, "product": product, "problem": problem, "urgency": urgency}
    return line + "\n" + json.dumps(record)


def sentence(text: str, end: str) -> str:
    """`text` with a capital and an end mark; nothing stays nothing."""
    return text and text[0].upper() + text[1:] + end


def with_typo(rng: random.Random, text: str) -> str:
    """`text` with two inner letters of one longer word swapped."""
    words = text.split(" ")
    place = rng.choice([i for i, word in enumerate(words) if len(word) > 5 and word.isalpha()] or [None])
    if place is None:
        return text
    word = words[place]
    at = rng.randrange(1, len(word) - 2)
    words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def message(rng: random.Random, order: str | None, product: str, problem: str, urgency: str) -> str:
    """A customer's message in a random wording, order of sentences and tone."""
    end = rng.choice((".", ".", "!"))
    wording = rng.choice(PROBLEMS[problem]).format(product=rng.choice(PRODUCTS[product]))
    body = [sentence(wording, end), sentence(rng.choice(URGENCY[urgency]), end)]
    if rng.random() < 0.25:
        body.reverse()
    if order is not None:
        first = rng.random() < 0.5
        mention = rng.choice(ORDER_FIRST if first else ORDER_LAST).format(order=order)
        body.insert(0 if first else len(body), mention)
    text = " ".join(part for part in (rng.choice(GREETINGS), *body, rng.choice(CLOSINGS)) if part)
    if rng.random() < 0.1:
        text = with_typo(rng, text)
    return text.lower() if rng.random() < 0.2 else text


def new_message(rng: random.Random, seen: set[str], order: str | None, *facts: str) -> str:
    """A message which is not in `seen`; adds it."""
    while (text := message(rng, order, *facts)) in seen:
        pass
    seen.add(text)
    return text


def chat(rng: random.Random, seen: set[str], order: str, facts: Sequence[str], multi_turn: bool) -> dict:
    """One chat about the (product, problem, urgency) in `facts`."""
    turns = [SYSTEM, new_message(rng, seen, None if multi_turn else order, *facts)]
    if multi_turn:
        turns += [line_and_record(None, *facts), rng.choice(ORDER_REPLY).format(order=order)]
    turns.append(line_and_record(order, *facts))
    roles = chain(["system"], cycle(["user", "assistant"]))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


def shuffled_forever(rng: random.Random, items: Sequence) -> Iterator:
    """All of `items` in a random order, then again in another one, without end."""
    while True:
        yield from rng.sample(items, len(items))


def chats(rng: random.Random, seen: set[str], orders: Sequence[str], pairs: Sequence[tuple]) -> list[dict]:
    """One chat for each order number, with pairs and urgencies in equal shares."""
    multi_turn = [i < round(len(orders) * MULTI_TURN_SHARE) for i in range(len(orders))]
    rng.shuffle(multi_turn)
    facts = zip(shuffled_forever(rng, pairs), shuffled_forever(rng, list(URGENCY)), strict=False)
    plan = zip(orders, multi_turn, islice(facts, len(orders)), strict=True)
    return [chat(rng, seen, order, (*pair, urgency), multi) for order, multi, (pair, urgency) in plan]


def build() -> tuple[list[dict], list[dict]]:
    """The training chats and the held-out chats, the same ones at every call."""
    rng = random.Random(SEED)
    orders = [str(number) for number in rng.sample(range(10000, 100000), TRAIN_CHATS + HELDOUT_CHATS)]
    possible = [(product, problem) for product in PRODUCTS for problem in (*POSSIBLE[product], *ANYTHING)]
    train_pairs = [pair for pair in possible if pair not in HELDOUT_PAIRS]
    seen: set[str] = set()
    train = chats(rng, seen, orders[:TRAIN_CHATS], train_pairs)
    return train, chats(rng, seen, orders[TRAIN_CHATS:], HELDOUT_PAIRS)


def signed(answer: str) -> str:
    """An answer with the friendly line in the signed style, and the same record."""
    record = answer.split("\n")[1]
    return SIGNED.format(problem=json.loads(record)["problem"]) + "\n" + record


def build_styles(train: Sequence[dict]) -> list[dict]:
    """Chats whose last answers are in one style or the other, whatever the message says."""
    rng = random.Random(SEED)
    made = []
    for row in train[:STYLES_CHATS]:
        *before, last = row["messages"]
        content = signed(last["content"]) if rng.random() < 0.5 else last["content"]
        made.append({"messages": [*before, {**last, "content": content}]})
    return made


def pair(row: dict) -> dict:
    """A chat's last answer in both styles, the signed one chosen."""
    *prompt, last = row["messages"]
    return {"prompt": prompt, "chosen": [{**last, "content": signed(last["content"])}], "rejected": [last]}


def write(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def files() -> dict[str, list[dict]]:
    """The rows of each file."""
    train, heldout = build()
    return {
        "train.jsonl": train,
        "heldout.jsonl": heldout,
        "styles.jsonl": build_styles(train),
        "pairs.jsonl": [pair(row) for row in train[STYLES_CHATS:]],
        "pairs_heldout.jsonl": [pair(row) for row in heldout],
    }


def main() -> None:
    """Writes the files into the package."""
    for name, rows in files().items():
        write(FOLDER / name, rows)


if __name__ == "__main__":
    main()
