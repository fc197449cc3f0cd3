"""The bundled demo data: what ships is what the generator builds, and the held-out part is held out."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from phinetune.demo_data.measures import exact_record

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "src" / "phinetune" / "demo_data"
KEYS = ["order", "product", "problem", "urgency"]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "tools" / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


TRAIN, HELDOUT = read("train"), read("heldout")
both = pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])


def turns(row: dict, role: str) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == role]


def record(answer: str) -> dict:
    return json.loads(answer.split("\n")[1])


def last_records(rows: list[dict]) -> list[dict]:
    return [record(row["messages"][-1]["content"]) for row in rows]


def column(rows: list[dict], *keys: str) -> set[tuple]:
    return {tuple(r[key] for key in keys) for r in last_records(rows)}


def test_shipped_files_are_what_the_generator_builds():
    assert generator().build() == (TRAIN, HELDOUT)


def test_files_are_byte_for_byte_what_the_generator_writes(tmp_path):
    module = generator()
    files = module.files()
    assert set(files) == {file.name for file in DEMO.glob("*.jsonl")}
    for name, rows in files.items():
        module.write(tmp_path / name, rows)
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_sizes():
    assert (len(TRAIN), len(HELDOUT)) == (420, 80)


def test_held_out_pairs_never_occur_in_training_but_their_parts_do():
    pairs = column(HELDOUT, "product", "problem")
    assert 12 <= len(pairs) <= 16
    assert not pairs & column(TRAIN, "product", "problem")
    for key in ("product", "problem"):
        assert column(HELDOUT, key) <= column(TRAIN, key)
    assert len(column(TRAIN, "product")) == 14
    assert len(column(TRAIN, "problem")) == 10


def test_no_message_occurs_twice():
    messages = [text for row in TRAIN + HELDOUT for text in turns(row, "user")]
    assert len(set(messages)) == len(messages)


def test_no_order_number_occurs_twice():
    orders = [r["order"] for r in last_records(TRAIN + HELDOUT)]
    assert len(set(orders)) == len(orders)
    assert all(len(order) == 5 and order.isdigit() for order in orders)


@both
def test_chats_are_system_then_user_and_assistant_in_turn(rows):
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles in (["system"] + ["user", "assistant"] * n for n in (1, 2))
    assert len({text for row in rows for text in turns(row, "system")}) == 1


@both
def test_every_answer_is_a_line_and_a_record(rows):
    for answer in (text for row in rows for text in turns(row, "assistant")):
        line, last = answer.split("\n")
        assert line
        assert list(json.loads(last)) == KEYS
        assert json.dumps(json.loads(last)) == last


@both
def test_order_numbers_come_from_the_messages_before(rows):
    for row in rows:
        users, answers = turns(row, "user"), turns(row, "assistant")
        for i, answer in enumerate(answers):
            order = record(answer)["order"]
            said = " ".join(users[: i + 1])
            assert order in said if order else not any(c.isdigit() for c in said)


@both
def test_the_second_answer_only_adds_the_order_number(rows):
    answers = [turns(row, "assistant") for row in rows]
    for first, second in (map(record, pair) for pair in answers if len(pair) == 2):
        assert first["order"] is None
        assert second["order"]
        assert {**first, "order": second["order"]} == second


@both
def test_share_of_multi_turn_chats(rows):
    assert 0.10 <= sum(len(turns(row, "user")) > 1 for row in rows) / len(rows) <= 0.25


@both
def test_every_urgency_occurs(rows):
    assert column(rows, "urgency") == {("high",), ("normal",), ("low",)}


# -- two styles of answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "source"), [("pairs", TRAIN), ("pairs_heldout", HELDOUT)])
def test_of_a_pair_the_signed_answer_is_chosen_and_both_have_the_same_record(name, source):
    """The check of the configuration tells them apart, and the other one finds no difference."""
    tree = yaml.safe_load((DEMO / "preference.yaml").read_text(encoding="utf-8"))
    (signed,) = [one["regex"] for one in tree["evaluation"]["metrics"] if isinstance(one, dict) and "regex" in one]
    pairs = read(name)
    prompts = [json.dumps(row["messages"][:-1]) for row in source]
    for row in pairs:
        assert json.dumps(row["prompt"]) in prompts
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert re.search(signed, chosen)
        assert not re.search(signed, rejected)
        assert exact_record(chosen, rejected)
        assert not exact_record(chosen, rejected.replace('"problem": "', '"problem": "no '))


def test_of_the_chats_to_imitate_about_half_are_signed_and_none_is_among_the_pairs():
    rows, pairs = read("styles"), read("pairs")
    assert 0.45 <= sum("Your Trailhead team" in row["messages"][-1]["content"] for row in rows) / len(rows) <= 0.55
    taught = {json.dumps(row["messages"][:-1]) for row in rows}
    assert not taught & {json.dumps(row["prompt"]) for row in pairs}
    assert len(rows) + len(pairs) == len(TRAIN)
