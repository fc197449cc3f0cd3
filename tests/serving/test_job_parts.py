"""The parts of a job: its configuration, its metrics, its place in the queue, and a look at its file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import TINY, chat, write_jsonl
from phinetune.config.run import make_config
from phinetune.data.check.findings import KINDS
from phinetune.errors import RunError
from phinetune.liveness import this_process
from phinetune.serving.job_config import chosen_numbers, final_config, first_config, save_interval
from phinetune.serving.job_metrics import Tail, as_csv, read_entries
from phinetune.serving.job_queue import PROGRAM, what_lacks, why_wait
from phinetune.serving.job_request import JobRequest
from phinetune.serving.settings import ServerSettings
from phinetune.serving.store import Store
from phinetune.serving.work import answer, look_at_file


def job_row(**request: Any) -> dict[str, Any]:
    body = JobRequest.model_validate({"model": "tiny", "training_file": "file-a", **request})
    return {
        "id": "ftjob-1",
        "request": body.model_dump_json(),
        "base": json.dumps({"path": TINY}),
        "adapter": "runs/ftjob-0",
        "seed": 5,
        "training_file": "file-a",
        "validation_file": body.validation_file,
    }


PLAN = {
    "steps": 90,
    "seconds": 60.0,
    "chosen": {"num_train_epochs": 3, "learning_rate": 0.002, "per_device_train_batch_size": 2,
               "gradient_accumulation_steps": 2, "r": 16, "lora_alpha": 32, "max_length": 1024, "system": "fold"},
}  # fmt: skip


def test_a_dpo_job_becomes_a_run_with_every_number_fixed(tmp_path: Path) -> None:
    hyper = {"beta": 0.3, "learning_rate_multiplier": 0.5}
    job = job_row(validation_file="file-b", method={"type": "dpo", "dpo": {"hyperparameters": hyper}})
    request = JobRequest.model_validate_json(job["request"])
    final = final_config(first_config(job, tmp_path), PLAN, request.wanted.learning_rate_multiplier)
    config = make_config(final)  # it is a configuration
    assert (config.objective.kind, config.objective.options) == ("dpo", {"beta": 0.3})
    assert config.model.adapter == str(tmp_path / "runs" / "ftjob-0")
    assert (config.data.train, config.data.eval) == tuple(
        str(tmp_path / "files" / f"file-{x}.jsonl") for x in ("a", "b")
    )
    assert config.data.system == "fold"
    assert config.training_config["learning_rate"] == 0.001
    assert config.training_config["save_steps"] == config.training_config["eval_steps"] == 30
    assert config.training_config["seed"] == 5
    assert chosen_numbers(final, request) == {
        "n_epochs": 3,
        "batch_size": 4,
        "learning_rate_multiplier": 0.5,
        "beta": 0.3,
    }


def test_checkpoints_come_once_an_epoch_and_at_least_every_five_minutes() -> None:
    assert save_interval(90, 3, 60.0) == 30
    assert save_interval(90, 3, None) == 30
    assert save_interval(1, 1, 1.0) == 1
    assert save_interval(300, 3, 3 * 3600.0) == 9  # 36 s a step: 8 and a third


def test_metrics_are_told_once_though_a_resumed_run_writes_them_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    one, two, valid, three = (
        {"step": 1, "loss": 2.0, "token_accuracy": 0.1, "time": 10.0},
        {"step": 2, "loss": None, "time": 12.0},
        {"step": 2, "eval_loss": 1.5, "eval_token_accuracy": 0.5},
        {"step": 3, "loss": 1.0, "time": 14.0},
    )
    path.write_text(json.dumps(one) + "\n" + json.dumps(two)[:9])
    tail = Tail(path)
    assert tail.new() == [one]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (one, two, valid)))
    assert tail.new() == [two, valid]
    assert tail.finish(10) == 28
    (tmp_path / "new").write_text(json.dumps(one) + "\n" + json.dumps(three) + "\n")
    os.replace(tmp_path / "new", path)
    assert tail.new() == [one, three]
    assert as_csv(read_entries(path)).splitlines()[1:] == ["1,2.0,0.1,,", "3,1.0,,,"]
    assert as_csv([two, valid]).splitlines()[1] == "2,,,1.5,0.5"  # a loss that is no number leaves its field empty


def test_a_job_waits_for_the_one_before_it_and_for_memory() -> None:
    other = {"id": "ftjob-0", "memory": 1, "process": json.dumps(this_process())}
    job = {"id": "ftjob-1", "memory": 1_000_000}
    two = ServerSettings(at_once=2)
    assert why_wait(job, [other], ServerSettings(at_once=1)) == (
        "ftjob-0 trains, and this server trains one job at a time"
    )
    assert why_wait(job, [], two) is None
    total = psutil.virtual_memory().total
    large = {"id": "ftjob-2", "memory": total}
    need = f"{(total + PROGRAM) / 1e9:.1f} GB of memory"
    assert why_wait(large, [], two) == f"it needs {need}, and less is free"
    half = psutil.virtual_memory().available - PROGRAM - 2_000_000_000
    promised = {**other, "memory": half}  # it does not hold it yet, but will
    assert "GB of memory" in (why_wait({**job, "memory": 4_000_000_000}, [promised], two) or "")
    assert "on the device" in (why_wait({**job, "memory": 0}, [{**other, "memory": 0}], two) or "")


def test_a_job_that_will_never_fit_fails_at_once() -> None:
    plan = {"memory": 1_000_000, "on_cpu": True, "disk": 1, "free_disk": 2}
    total = psutil.virtual_memory().total
    assert what_lacks(plan) is None
    assert (what_lacks({**plan, "memory": total}) or ("",))[0] == "insufficient_memory"
    assert what_lacks({**plan, "memory": total, "on_cpu": False}) is None  # the device's, which the plan looked at
    assert (what_lacks({**plan, "disk": 3}) or ("",))[0] == "insufficient_disk"


PAIR = {
    "input": {"messages": [{"role": "user", "content": "Hi"}]},
    "preferred_output": [{"role": "assistant", "content": "Hello!"}],
    "non_preferred_output": [{"role": "assistant", "content": "What?"}],
}


@pytest.mark.parametrize(
    ("rows", "form", "wrong"),
    [
        ([chat("Hi", "Hello!"), chat("a", "b", system="Be brief.")], "chat", []),
        ([PAIR], "preference", []),
        ([{"prompt": "a", "completion": " b"}], "completion", []),
        ([chat("Hi", "Hello!"), PAIR], "chat", [2]),
        ([chat("Hi", "Hello!"), {"messages": [{"role": "user", "content": "a"}]}, {"messages": []}], "chat", [2, 3]),
        ([chat("Hi", "Hello!"), {"text": "a"}, [], "x"], "chat", [2, 3, 4]),
        ([], None, [1]),
    ],
)
def test_a_file_is_looked_at_line_by_line(tmp_path: Path, rows: list[Any], form: str | None, wrong: list[int]) -> None:
    path = write_jsonl(tmp_path / "file-1.jsonl", rows)
    found = look_at_file({"path": str(path), "rows": 10, "model": {"path": TINY}})
    assert (found["form"], [one["line"] for one in found["problems"]]) == (form, wrong)
    assert str(tmp_path) not in json.dumps(found)
    assert look_at_file({"path": str(path), "rows": 0, "model": {"path": TINY}})["problems"] or not rows


def test_what_is_wrong_with_a_line_is_of_a_kind(tmp_path: Path) -> None:
    """The page says the kind in its own language."""
    path = tmp_path / "file-1.jsonl"
    lines = [json.dumps(chat("Hi", "Hello!")), "{“messages”: 1}", "[]", '{"问题": "?"}', json.dumps(PAIR)]
    path.write_bytes("\n".join([*lines, ""]).encode() + "你好\n".encode("gbk"))
    found = look_at_file({"path": str(path), "rows": 10, "model": {"path": TINY}})
    kinds = {one["line"]: one["kind"] for one in found["problems"]}
    assert kinds == {2: "no_json", 3: "no_object", 4: "form", 5: "mixed_forms", 6: "encoding"}
    found = look_at_file({"path": str(path), "rows": 2, "model": {"path": TINY}})
    assert [one["kind"] for one in found["problems"]] == ["too_many_rows"]
    path.write_text("\n".join([lines[0], '{"messages": [{"role": "user", "content": "a"}]}', '{"messages": []}']))
    found = look_at_file({"path": str(path), "rows": 10, "model": {"path": TINY}})
    assert {one["kind"] for one in found["problems"]} <= set(KINDS)
    path.write_text("")
    found = look_at_file({"path": str(path), "rows": 10, "model": {"path": TINY}})
    assert [one["kind"] for one in found["problems"]] == ["nothing"]


def test_work_that_fails_is_told_and_the_next_is_done(tmp_path: Path) -> None:
    config = {"model": {"path": TINY}, "data": {"train": str(tmp_path / "none.jsonl")}}
    assert "none.jsonl" in answer(json.dumps({"task": "plan", "config": config}))["problems"][0]
    assert answer(json.dumps({"task": "plan"}))["unexpected"] == "KeyError"
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"q {i}", f"a {i}") for i in range(8)])
    config["data"] = {"train": str(path)}
    done = answer(json.dumps({"task": "plan", "config": {**config, "training_config": {"output_dir": str(tmp_path)}}}))
    assert done["done"]["steps"] == 16  # 4 epochs of 4 steps
    assert done["done"]["chosen"]["learning_rate"] > 0


def test_what_a_client_can_mend_is_told_from_what_the_server_lacks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"q {i}", f"a {i}") for i in range(8)])
    config = {"model": {"path": str(tmp_path / "none")}, "data": {"train": str(path)}}
    assert answer(json.dumps({"task": "plan", "config": config}))["servers"]
    config |= {"model": {"path": TINY}, "data": {"train": str(tmp_path / "none.jsonl")}}
    assert "servers" not in answer(json.dumps({"task": "plan", "config": config}))
    broken = {"path": "/proc/self/mem", "rows": 9, "model": {"path": TINY}}  # a disk that reports an error
    assert answer(json.dumps({"task": "check", **broken}))["servers"]


def test_a_state_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "server.sqlite")
    store.write("PRAGMA user_version=99")
    store.close()
    with pytest.raises(RunError, match="newer phinetune"):
        Store(tmp_path / "server.sqlite")
    (tmp_path / "other.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(RunError, match="can't be read"):
        Store(tmp_path / "other.sqlite")
