"""`phinetune evaluate`: metrics, tags, tasks, and what it does not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cli.cli_helpers import run
from helpers import chat, write_jsonl
from phinetune.run_folder import MARK


@pytest.fixture
def tiny_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy: an evaluation leaves its results in the run."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def held(tmp_path: Path) -> Path:
    rows = [{**chat(f"How many are {i} and {i}?", f"{2 * i}."), "task": "ab"[i % 2]} for i in range(4)]
    return write_jsonl(tmp_path / "held.jsonl", rows)


def test_metrics_and_a_tag_are_named_on_the_command_line(
    tiny_run: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def short(answer, reference):\n    return len(answer) < 1000\n")
    metrics = f"[bleu, {{name: short, function: '{tmp_path / 'mine.py'}:short'}}, {{name: five, regex: '5'}}]"
    out = tmp_path / "found.json"
    given = ("evaluate", tiny_run, "--data", held, "--max-new-tokens", 4, "--out", out)
    assert run(monkeypatch, *given, "--metrics", metrics, "--tag", "task") == 0
    tree = json.loads(out.read_text())
    counted = {"bleu", "short", "five", "stopped", "repeating"}
    scored = {"loss", "perplexity", "token_accuracy"}
    assert set(tree["evaluation"]["tuned"]) == counted | scored | {"labelled_tokens", "prompts"}
    assert tree["evaluation"]["tuned"]["short"] == 100
    assert set(tree["differences"]) == counted | scored
    assert tree["differences"]["short"]["verdict"] == "no clear difference"
    assert {tag: found["rows"] for tag, found in tree["by_tag"].items()} == {"a": 2, "b": 2}
    shown = capsys.readouterr().out
    assert "95% interval" in shown
    assert "no clear difference" in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--metrics", "[blue]"), "there is no metric `blue`; did you mean `bleu`?"),
        (("--metrics", "[bleu"), "write it as YAML"),
        (("--metrics", "[{name: x, regex: a, regex: b}]"), "`regex` is given twice; keep one of them"),
        (("--metrics", "[" * 3000), "values lie too deep in one another"),
        (("--metrics", "[{name: x, function: 'gone.py:f'}]"), "no such file: gone.py"),
        (("--metrics", "[{name: x, compute: 'math:nope'}]"), "there is no function `nope` in math"),
        (("--max-new-tokens", "2", "--metrics", "[{name: x, compute: 'operator:truediv'}]"), "`x` failed on 3 answers"),
        (("--max-new-tokens", "2", "--metrics", "[{name: x, function: 'operator:truediv'}]"), "(held-out prompt 1)"),
        (("--metrics", "[{name: x, classes: [one, two]}]"), "answers of their own that name none of its labels"),
        (("--tag", "topic"), "no row of"),
        (("--tasks", "mmlu"), "--data and --tasks are two evaluations"),
    ],
)
def test_mistakes_are_sentences(
    tiny_run: Path,
    held: Path,
    more: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "evaluate", tiny_run, "--data", held, *more) == 2
    err = capsys.readouterr().err
    assert words in err
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_a_function_that_only_the_run_names_is_not_called(
    tiny_run: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may be anyone's: opening it must run nothing of theirs."""
    run_folder = tmp_path / "theirs"
    run_folder.mkdir()
    for file in tiny_run.iterdir():
        if file.is_file():
            (run_folder / file.name).write_bytes(file.read_bytes())
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\ndef f(a, r):\n    return 1\n")
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    tree["evaluation"]["metrics"] = [
        "exact_match",
        {"name": "trap", "function": f"{trap}:f"},
        {"name": "snare", "compute": f"{trap}:f"},
    ]
    (run_folder / "config.yaml").write_text(MARK + yaml.safe_dump(tree))
    assert run(monkeypatch, "evaluate", run_folder, "--data", held, "--max-new-tokens", 2) == 0
    assert not (tmp_path / "sprung").exists()
    assert "Left out: trap, snare." in capsys.readouterr().out


def test_tasks_of_a_folder(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"q": f"{i} + 1 =", "a": [" 1", f" {i + 1}"]} for i in range(4)])
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: 1\ndoc_to_choice: '{{a}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "found.json"
    assert run(monkeypatch, "evaluate", tiny_run, "--tasks", "sums", "--include-path", tmp_path, "--out", out) == 0
    (found,) = json.loads(out.read_text())["tasks"]
    assert (found["task"], found["metric"], set(found["values"])) == ("sums", "acc,none", {"base", "tuned"})
    assert "sums" in capsys.readouterr().out
