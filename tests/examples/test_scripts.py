"""The scripts run as a reader runs them, on fewer rows; `accelerate launch` with two processes included."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_example_data import texts

import phinetune
from examples.example_helpers import EXAMPLES
from helpers import GUIDE_PEFT, GUIDE_TRAINING, TINY
from phinetune.config.model import ModelSection
from serving.serving_helpers import training_server

TWO = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def run(examples: Path, *arguments: str, threads: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=examples.parent,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_short_script(examples: Path) -> None:
    done = run(examples, str(examples / "finetune_script.py"), "--rows", "28", "--model", TINY)
    assert done.stdout.splitlines()[-1].startswith("All as said: ")
    folder = examples.parent / "runs" / "finetune_script"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert "optim: paged_adamw_32bit" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_model_cards_sample(examples: Path, processes: int) -> None:
    launcher = TWO if processes == 2 else []
    script = [str(examples / "sample_finetune.py"), "--rows", "48", "--model", TINY]  # the starter takes minutes
    done = run(examples, *launcher, *script, threads=2 // processes)
    folder = examples.parent / "checkpoint_dir"
    assert done.stdout.count("All as said: ") == 1, "one process prints"
    assert f"processes: {processes}" in done.stdout
    for word in ("`overwrite_output_dir` is retired", "`warmup_ratio` is retired"):
        assert done.stdout.count(word) == 1, word
    results = json.loads((folder / "results.json").read_text())
    assert results["evaluation"]["tuned"]["loss"] < results["evaluation"]["base"]["loss"]
    assert (folder / "adapter_model.safetensors").is_file()


def test_the_course_by_openais_client(examples: Path, tmp_path: Path) -> None:
    """Files, job, events and chats against a server; the numbers of a whole run are the starter's."""
    with training_server(tmp_path / "server", {"tiny": ModelSection(path=TINY)}) as client:
        given = {"OPENAI_BASE_URL": str(client.base_url), "OPENAI_API_KEY": client.api_key}
        script = [str(examples / "openai_course.py"), "--model", "tiny", "--rows", "16", "--held-out", "4"]
        done = run(examples, *script, **given)
    assert done.stdout.splitlines()[-1].startswith("All as said: ")
    assert "The job has successfully completed" in done.stdout
    assert "ft:tiny:phinetune:trailhead:" in done.stdout
    (uploaded,) = (tmp_path / "server" / "files").glob("*.jsonl")
    rows = (Path(phinetune.__file__).parent / "demo_data" / "train.jsonl").read_text().splitlines()[:16]
    assert [json.loads(row) for row in uploaded.read_text().splitlines()] == [json.loads(row) for row in rows]


def test_the_samples_dictionaries_are_the_model_cards() -> None:
    tree = ast.parse((EXAMPLES / "sample_finetune.py").read_text(encoding="utf-8"))
    given = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(given["training_config"]) == GUIDE_TRAINING
    assert ast.literal_eval(given["peft_config"]) == GUIDE_PEFT


def test_the_data_is_what_the_tool_writes() -> None:
    for name, text in texts().items():
        assert (EXAMPLES / "data" / name).read_text(encoding="utf-8") == text
