"""lm-evaluation-harness on a local task folder and the tiny model, offline."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from chats.template_helpers import NAMES, template_tokenizer
from helpers import write_jsonl
from phinetune.checkpoints.opened import Opened, open_model
from phinetune.errors import ConfigError, DataError
from phinetune.evaluation.harness import TaskResult, _rendered, open_tasks, run_tasks
from phinetune.screen.harness_tasks import show_tasks

pytest.importorskip("lm_eval")

TASK = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: right
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ANSWERING = """
task: answering
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[right]}}}}"
generation_kwargs: {{until: ["zzzz"], max_gen_toks: 3}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"How many are {i} and {i}?", "choices": [" 1!", f" {2 * i}.", " no"], "right": 1}
        for i in range(8)
    ]
    file = write_jsonl(place / "rows.jsonl", rows)
    (place / "counting.yaml").write_text(TASK.format(file=file))
    (place / "answering.yaml").write_text(ANSWERING.format(file=file))
    (place / "gone.yaml").write_text(TASK.format(file=place / "gone.jsonl").replace("counting", "gone"))
    return place


@pytest.fixture(scope="module")
def tuned(tiny_run: Path) -> Opened:
    return open_model(tiny_run)


def run(tuned: Opened, folder: Path, *tasks: str, **options: Any) -> list[TaskResult]:
    return run_tasks(tuned.model, tuned.loaded.tokenizer, tasks, open_tasks(tasks, folder), **options)


def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """How often the right choice is the likeliest, by hand."""
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before = tokenizer.encode(row["question"])
            ids = torch.tensor([tokenizer.encode(row["question"] + choice)])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].float().log_softmax(-1)
            places = range(len(before), ids.shape[1])
            scores.append(sum(logs[i - 1, ids[0, i]].item() for i in places))
        right += max(range(3), key=scores.__getitem__) == row["right"]
    return right / len(rows)


def test_base_and_tuned_side_by_side_as_by_hand(tuned: Opened, folder: Path, console: Console) -> None:
    (found,) = run(tuned, folder, "counting")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    with tuned.model.disable_adapter():
        base = accuracy(tuned.model, tuned.loaded.tokenizer, rows)
    after = accuracy(tuned.model, tuned.loaded.tokenizer, rows)
    assert base != after
    assert (found.task, found.metric, found.values) == ("counting", "acc,none", {"base": base, "tuned": after})
    assert found.difference is not None
    assert found.difference.change == pytest.approx(after - base)
    assert found.difference.rows == 8
    wanted = math.sqrt(after * (1 - after) / 7)  # the standard error of a mean
    assert found.errors["tuned"] == pytest.approx(wanted)
    assert json.loads(json.dumps(found.to_dict()))["values"] == found.values
    show_tasks([found], console)
    assert "counting" in console.file.getvalue()  # type: ignore[attr-defined]


def test_tasks_that_generate_run_too(tuned: Opened, folder: Path, console: Console) -> None:
    found = run(tuned, folder, "answering", "counting", limit=2, batch_size=2)
    assert [(one.task, one.metric) for one in found] == [("answering", "exact_match,none"), ("counting", "acc,none")]


def test_a_model_without_an_adapter_is_measured_alone(tuned: Opened, folder: Path, console: Console) -> None:
    base = open_model(tuned.config.model.path)
    (found,) = run(base, folder, "counting", limit=3)
    assert list(found.values) == ["base"]
    assert found.difference is None
    show_tasks([found], console)


def test_what_can_not_be_had_is_said(tuned: Opened, folder: Path, console: Console, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the harness has no such task; did you mean `counting`"):
        run(tuned, folder, "countin")
    with pytest.raises(ConfigError, match="no such folder"):
        run(tuned, tmp_path / "nowhere", "counting")
    with pytest.raises(DataError, match="--tasks gone: "):
        run(tuned, folder, "gone")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reply", [True, False])
def test_chats_are_rendered_as_the_harness_renders_them(name: str, reply: bool) -> None:
    tokenizer = template_tokenizer(name)
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": " Two. "}][: 1 if reply else 2]
    options = {"tokenize": False, "add_generation_prompt": reply, "continue_final_message": not reply}
    assert _rendered(tokenizer, chat, reply) == tokenizer.apply_chat_template(chat, **options)


def test_a_template_that_never_ends_is_refused_in_a_sentence(tuned: Opened, folder: Path) -> None:
    tokenizer = copy.copy(tuned.loaded.tokenizer)
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    manager = open_tasks(["counting"], folder)
    with pytest.raises(DataError, match="far more than this chat needs"):
        run_tasks(tuned.model, tokenizer, ["counting"], manager, limit=1, chat_template=True)
