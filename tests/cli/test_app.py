"""The command line: every mistake is a sentence and status 2 or 71; every command says what to do next."""

from __future__ import annotations

import errno
import io
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import phinetune
from cli.cli_helpers import run
from helpers import chat, tiny_config, write_jsonl
from phinetune.cli.app import main
from phinetune.cli.program import program
from phinetune.config.run import dump_config
from phinetune.errors import ConfigError, MachineError


@pytest.fixture
def config_file(chats: Path, tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(tiny_config(chats, tmp_path / "run")))
    return file


def without_heavy_imports(option: str) -> str:
    """What the program prints with this option alone."""
    code = (
        f"import sys; sys.argv = ['phinetune', '{option}']\n"
        "from phinetune.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'trl', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_needs_no_heavy_import() -> None:
    shown = without_heavy_imports("--help")
    verbs = ("train", "evaluate", "generate", "chat", "demo", "convert", "push", "report", "watch", "config")
    for verb in verbs:
        assert verb in shown


def test_the_versions_that_a_report_of_a_fault_needs_are_one_line() -> None:
    line = without_heavy_imports("--version")
    assert line.startswith(f"phinetune {phinetune.__version__} (Python {platform.python_version()}, ")
    for library in ("torch", "transformers", "peft", "trl"):
        assert f"{library} {version(library)}" in line


def test_train_then_everything_else(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(monkeypatch, "train", config_file) == 0
    out = capsys.readouterr().out
    assert "exact match %" in out
    assert f"See how it went: {folder / 'report.html'}" in out
    assert out.rstrip().splitlines()[-4:] == [
        f"  phinetune chat {folder}",
        f'  phinetune generate {folder} --prompt "…"',
        f"  phinetune evaluate {folder} --data FILE",
        f"  phinetune export {folder} --to ollama",
    ]

    assert run(monkeypatch, "evaluate", folder, "--data", tmp_path / "x.jsonl") == 2
    rows = write_jsonl(tmp_path / "held.jsonl", [chat("a", "b"), chat("c", "d")])
    result = tmp_path / "result.json"
    assert run(monkeypatch, "evaluate", folder, "--data", rows, "--out", result, "--max-new-tokens", 3) == 0
    tree = json.loads(result.read_text())
    assert set(tree["evaluation"]) == {"base", "tuned"}
    assert json.loads((folder / "evaluation.json").read_text())["data"]["held_out"]["kept"] == 2
    assert f"Evaluated since, on {rows}" in (folder / "report.html").read_text()
    assert len(tree["examples"]) == 2

    capsys.readouterr()
    assert run(monkeypatch, "generate", folder, "--prompt", "Hi", "--max-new-tokens", 4) == 0
    by_option = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert run(monkeypatch, "generate", folder, "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out == by_option
    assert run(monkeypatch, "generate", folder, "--prompt", "Hi", "--max-new-tokens", 4, "--base") == 0
    assert capsys.readouterr().out != by_option

    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    assert run(monkeypatch, "generate", folder, "--prompt", "Hi", "--max-new-tokens", 4, "--weights", "q8_0") == 0
    assert run(monkeypatch, "chat", folder) == 0


def test_a_program_off_the_path_is_named_by_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A newcomer's `.venv/bin/phinetune` is not on the path, and the next command must work as printed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "phinetune"), "demo"])
    assert program() == ".venv/bin/phinetune"


def test_config_explains_every_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "config") == 0
    out = capsys.readouterr().out
    assert "data.loss_on" in out
    assert "tokens trained on" in out


def mistakes(tmp_path: Path, tiny_run: Path, config_file: Path) -> dict[str, tuple[list[object], str]]:
    """Command lines with one mistake each, and words that the sentence about it must hold."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [\n')
    unanswered = write_jsonl(tmp_path / "unanswered.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    other_base = tmp_path / "other"
    other_base.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json", "config.yaml"):
        (other_base / name).write_bytes((tiny_run / name).read_bytes())
    text = (other_base / "config.yaml").read_text()
    (other_base / "config.yaml").write_text(text.replace("seed: 0", "seed: 5", 1))

    def train(*overrides: str) -> list[object]:
        return ["train", config_file, *(part for o in overrides for part in ("--set", o))]

    return {
        "missing config": (["train", tmp_path / "no.yaml"], "no.yaml: no such file"),
        "missing data": (train("data.train=no.jsonl"), "no.jsonl: no such file"),
        "broken line": (train(f"data.train={broken}"), "broken.jsonl:1: broken JSON"),
        "no answer": (train(f"data.train={unanswered}", "data.eval=null"), "unanswered.jsonl:1: no assistant turn"),
        "empty set": (train(f"data.train={empty}", "data.eval=null"), "the set is empty"),
        "misspelt key": (train("training_config.max_step=1"), "did you mean `max_steps`?"),
        "misspelt section": (train("dta.train=x"), "did you mean `data`?"),
        "bad log level": (train("training_config.log_level=loud"), "`loud` is none of debug, info"),
        "finished run": (train(f"training_config.output_dir={tiny_run}"), "holds a finished run"),
        "occupied folder": (train(f"training_config.output_dir={occupied}"), "no run of phinetune wrote"),
        "no such place": (train("training_config.output_dir=/proc/nowhere/run"), "No such file or directory"),
        "nothing to resume": (["train", config_file, "--resume"], "holds no run to go on with"),
        "no such model": (train("model.path=no/such/folder/here"), "no such folder"),
        "bad targets": (train("peft_config.target_modules=[query]"), "`query` matches no linear layer"),
        "bad rank": (train("peft_config.r=0"), "peft_config.r: it should be 1 or more (given: 0)"),
        "another base": (["generate", other_base, "--prompt", "Hi"], "this adapter was trained on"),
        "no run": (["chat", tmp_path / "nothing"], "no such folder"),
        "no message": (["generate", tiny_run, "--prompt", " "], "there is no message"),
        "no weights": (["generate", tiny_run, "--prompt", "Hi", "--weights", "q4"], "weights: 'q4' is none of auto"),
        "no device": (["generate", tiny_run, "--prompt", "Hi", "--device", "gpu"], "`gpu` is no device"),
    }


def test_every_mistake_is_a_sentence_and_status_2(
    config_file: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {p: p.read_bytes() for p in tiny_run.rglob("*") if p.is_file()}
    for name, (arguments, words) in mistakes(tmp_path, tiny_run, config_file).items():
        assert run(monkeypatch, *arguments) == 2, name
        err = capsys.readouterr().err
        assert words in err, name
        assert "Traceback" not in err, name
        assert all(line.startswith("error: ") for line in err.splitlines()), (name, err)
    assert {p: p.read_bytes() for p in tiny_run.rglob("*") if p.is_file()} == before
    assert (tmp_path / "occupied" / "thesis.txt").read_text() == "mine"


def test_a_real_process_ends_with_status_2_and_no_traceback(config_file: Path) -> None:
    command = [sys.executable, "-m", "phinetune", "train", str(config_file), "--set", "data.train=no.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no.jsonl: no such file\n"


@pytest.mark.parametrize("given", ["1s", "0.5s", "0:00:01"])
def test_a_run_whose_time_is_over_ends_with_status_75_and_can_go_on(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    longer = ("--set", "training_config.max_steps=5000")
    assert run(monkeypatch, "train", config_file, "--max-time", given, *longer) == 75
    out = capsys.readouterr().out
    assert "Stopped after step" in out
    assert "--resume" in out
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert run(monkeypatch, "train", config_file, "--resume", "--max-time", given, *longer) == 75


@pytest.mark.parametrize("given", ["tomorrow", "-5m", "10"])
def test_a_time_that_is_none_is_a_sentence(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    assert run(monkeypatch, "train", config_file, f"--max-time={given}") == 2
    assert f"error: max_time (--max-time): `{given}` is no duration; write it as 2h30m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left", 71),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up", 71),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "limit of file sizes", 71),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"), "to its end", 71),
        (MemoryError(), "the memory is not enough", 71),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory is not enough", 71),
        (MachineError("told by whoever knew the folder"), "told by whoever knew the folder", 71),
        (OSError(errno.EACCES, "Permission denied", "x.json"), "[Errno 13] Permission denied: 'x.json'", 2),
        (ConfigError("a mistake"), "a mistake", 2),
    ],
    ids=str,
)
def test_what_the_machine_refuses_is_a_sentence_in_every_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str, status: int
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr("phinetune.cli.app.app", fails)
    assert run(monkeypatch, "merge") == status
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_a_fault_of_this_package_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr("phinetune.cli.app.app", fails)
    with pytest.raises(ValueError, match="ours"):
        main()


@pytest.mark.parametrize("kilobytes", [900_000, 1_500_000, 1_900_000])
def test_too_little_address_space_for_the_libraries_is_a_sentence(config_file: Path, kilobytes: int) -> None:
    """Without it, the libraries end the process by a segmentation fault as they are loaded, or tell of MemoryError."""
    command = f"ulimit -v {kilobytes}; exec {sys.executable} -m phinetune train {config_file}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this shell limits the address space to")
    assert len(done.stderr.splitlines()) == 1
