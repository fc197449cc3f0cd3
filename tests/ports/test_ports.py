"""Twelve kinds of projects, each carried over in at most twelve lines, from the data as people have it to a report.

The ports are those of examples/ports. Here they run as they stand, on a tiny model in place of Phi-3.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import TINY, write_jsonl
from phinetune.api.train import train_config
from phinetune.config.run import load_config
from phinetune.run_folder import RunFolder
from phinetune.screen.console import silent

PORTS = Path(__file__).resolve().parents[2] / "examples" / "ports"
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
QUICK = ["evaluation.max_new_tokens=8", "evaluation.max_prompts=6"]
COUNT = 16
WORDS = ["tent", "stove", "rope", "lamp", "boot", "map", "pan", "tarp", "axe", "mat", "cup", "pole", "sack", "jar"]
NAMES = [f"{WORDS[i % 14]} {WORDS[(3 * i + 1) % 14]}" for i in range(COUNT)]


def sql() -> None:
    rows = [
        {
            "question": f"How many of {name} are there?",
            "context": "CREATE TABLE stock (name VARCHAR, pieces INTEGER)",
            "answer": f"SELECT pieces FROM stock WHERE name = '{name}'",
        }
        for name in NAMES
    ]
    write_jsonl(Path("sql.jsonl"), rows)


def edits() -> None:
    tasks = ("gec", "simplify")
    rows = [{"src": f"Fix it: the {n} are red.", "tgt": f"The {n} is red.", "task": tasks[len(n) % 2]} for n in NAMES]
    write_jsonl(Path("edits.jsonl"), rows)


def cypher() -> None:
    with Path("cypher.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "schema", "cypher"])
        for name in NAMES:
            schema = "(:Item {name})\n(:Shop {city})"
            table.writerow([f"Who sells {name}?", schema, f'MATCH (s)-->(i {{name: "{name}"}}) RETURN s'])


def alpaca_prompt() -> None:
    parts = [{"instruction": f"Sell a {n}.", "input": "", "output": f"Buy the {n}!"} for n in NAMES]
    rows = [{**part, "prompt": f"### Input: {part['instruction']}\n### Output:\n{part['output']}"} for part in parts]
    write_jsonl(Path("alpaca.jsonl"), rows)


def flashcards() -> None:
    always = {"instruction": "Answer this truthfully"}
    rows = [{**always, "input": f"What is a {n}?", "output": f"Gear: {n}."} for n in NAMES]
    write_jsonl(Path("cards.jsonl"), rows)


def tagged_text() -> None:
    rows = [
        {"text": f"### Human: {n}?\n### Assistant: Yes, {n}.\n### Human: {i} of them?\n### Assistant: {i + 1}."}
        for i, n in enumerate(NAMES)
    ]
    write_jsonl(Path("tagged.jsonl"), rows)


def pdf_pages() -> None:
    Path("pages").mkdir()
    for i, name in enumerate(NAMES):
        Path("pages", f"{i}.txt").write_text(f"Chapter {i}\n\nOn the {name}. " + f"It is a {name}. " * 20)
    Path("heldout.md").write_text("# Of tents\n\nA tent is a tent.\n")


def phrases() -> None:
    tones = ("formal", "warm")
    rows = [
        {"phrase": f"Get the {n}", "tone": tones[i % 2], "rewritten": f"Kindly get {n}"} for i, n in enumerate(NAMES)
    ]
    write_jsonl(Path("phrases.jsonl"), rows)


def personal_data() -> None:
    rows = []
    for i, name in enumerate(NAMES):
        found = json.dumps({"name": name, "age": i})
        turns = [{"role": "user", "content": f"{name} is {i}."}, {"role": "assistant", "content": found}]
        rows.append({"meta": {"kind": ("mail", "chat")[i % 2], "id": i}, "dialog": {"lang": "en", "messages": turns}})
    write_jsonl(Path("personal.jsonl"), rows)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name", "age"]}
    Path("entities.json").write_text(json.dumps(schema))


def reviews() -> None:
    Path("reviews").mkdir()
    for split, part in (("train", NAMES[:8]), ("validation", NAMES[8:12]), ("test", NAMES[12:])):
        rows = [{"patch": f"+ {n}", "comment": f"Name {n} better."} for n in part]
        write_jsonl(Path("reviews", f"{split}.jsonl"), rows)


def data_frame() -> None:
    topics = ("billing", "delivery", "returns")
    lines = [f"Where is my {name} number {i}?,{topics[i % 3]}" for i, name in enumerate(NAMES * 3)]
    Path("tickets.csv").write_text("\n".join(["subject,topic", *lines]) + "\n")


def generator() -> None:
    """It makes its own rows."""


# For each port, what makes its data, the measures that only it has, and what its first held-out prompt holds.
KINDS: dict[str, tuple[Callable[[], None], set[str], str]] = {
    "sql.yaml": (sql, {"result_right", "exact_match"}, "How many of"),
    "edits.yaml": (edits, {"exact_match", "chrf"}, "Fix it: the"),
    "cypher.yaml": (cypher, {"matches"}, "Graph:\n(:Item {name})\n(:Shop {city})\n\nQuestion: Who sells"),
    "alpaca_prompt.yaml": (alpaca_prompt, {"bleu"}, "### Output:\n"),
    "flashcards.yaml": (flashcards, {"exact_match", "rouge_l"}, "What is a"),
    "tagged_text.yaml": (tagged_text, {"rouge_l"}, "### Assistant: Yes, "),
    "pdf_pages.yaml": (pdf_pages, {"loss"}, ""),
    "phrases.yaml": (phrases, {"exact_match"}, "Say it in a "),
    "personal_data.yaml": (personal_data, {"fits", "json_fields"}, " is "),
    "reviews.yaml": (reviews, {"loss"}, "Review this change:\n+ "),
    "data_frame.py": (data_frame, {"topic_macro_f1", "topic_accuracy"}, "Where is my"),
    "generator.py": (generator, {"kinds"}, "Double "),
}


def run_port(port: Path) -> RunFolder:
    """Run a port in the working folder, on the tiny model."""
    text = port.read_text().replace(PHI3, TINY)
    if port.suffix == ".py":
        exec(compile(text, str(port), "exec"), {"__name__": "port"})
    else:
        quoted = port.read_text().replace(PHI3, f'"{TINY}"')
        Path("run.yaml").write_text(quoted)
        train_config(load_config("run.yaml", QUICK), silent())
    (folder,) = Path("runs").iterdir()
    return RunFolder(folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_port_runs_from_its_data_to_a_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, measures, prompt = KINDS[name]
    make()
    folder = run_port(PORTS / name)
    results = json.loads((folder.path / "results.json").read_text())
    assert measures <= results["evaluation"]["tuned"].keys()
    assert all(prompt in example["prompt"] and example["reference"] for example in results["examples"])
    assert bool(results["examples"]) == bool(prompt)
    assert (folder.path / "report.html").is_file()
    assert results["data"]["train"]["dropped"] == {}


def test_every_port_has_a_kind_and_at_most_twelve_lines() -> None:
    files = sorted(PORTS.glob("*.yaml")) + sorted(PORTS.glob("*.py"))
    assert {file.name for file in files} == KINDS.keys()
    lengths = {file.name: len([line for line in file.read_text().splitlines() if line.strip()]) for file in files}
    assert {name: length for name, length in lengths.items() if length > 12} == {}


def test_the_readme_of_the_ports_names_each() -> None:
    named = re.findall(r"\]\((\w+\.(?:yaml|py))\)", (PORTS / "README.md").read_text())
    assert sorted(named) == sorted(KINDS)


def results_of(name: str) -> Any:
    KINDS[name][0]()
    return json.loads((run_port(PORTS / name).path / "results.json").read_text())


def test_tagged_text_is_trained_on_its_answers_and_asked_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = results_of("tagged_text.yaml")
    facts = results["data"]["train"]
    assert 0 < facts["trainable_tokens"] < facts["tokens"] / 2
    first = results["examples"][0]
    assert first["prompt"].endswith("### Assistant:")
    assert re.fullmatch(r"\d+\.", first["reference"])
