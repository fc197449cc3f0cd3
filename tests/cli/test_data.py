"""`phinetune data check` and `preview`: a screen, JSON, a cleaned file, and a status that a script can go by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli import cli_helpers
from helpers import TINY, chat, tiny_config, write_jsonl
from phinetune.config.run import dump_config

GIVEN = f" --set 'model.path={TINY}'"  # by `run`; a next command needs it, too
SOUND = [chat(f"How far is town {i} from here?", f"It is {i} miles.") for i in range(5)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line in this process; its exit status. Without a configuration, the tiny model's tokenizer."""

    def call(verb: str, *arguments: object) -> int:
        model = [] if "--config" in arguments else ["--set", f"model.path={TINY}"]
        return cli_helpers.run(monkeypatch, "data", verb, *arguments, *model)

    return call


def config_for(chats: Path, folder: Path, **data: Any) -> Path:
    config = tiny_config(chats, folder / "run", max_length=64)
    for key, value in data.items():
        setattr(config.data, key, value)
    file = folder / "run.yaml"
    file.write_text(dump_config(config))
    return file


def test_a_sound_file_ends_with_what_to_do_next(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", SOUND)
    assert run("check", file) == 0
    out = capsys.readouterr().out
    assert f"{file}: 5 rows (5 as messages): 5 kept" in out
    assert "Nothing stands out." in out
    assert out.splitlines()[-1] == f"Next: phinetune data preview {file}{GIVEN}"


def test_a_spoiled_file_has_status_1_and_can_be_fixed(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*SOUND, chat("What?", "")])
    assert run("check", file) == 1
    out = capsys.readouterr().out
    assert "✗ answers without words (1); the model would learn to say nothing" in out
    assert f"{file}:6: turn 2" in out
    assert out.splitlines()[-1] == f"  phinetune data check {file}{GIVEN} --fix a-clean.jsonl"
    clean = tmp_path / "clean.jsonl"
    assert run("check", file, "--fix", clean) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-2:] == [
        f"Wrote {clean}: 5 rows; left out 1: answers without words",
        f"Next: phinetune data check {clean}{GIVEN}",
    ]
    assert run("check", clean) == 0
    before = clean.read_bytes()
    assert run("check", file, "--fix", clean) == 2
    assert "something stands there already" in capsys.readouterr().err
    assert clean.read_bytes() == before


def test_json_is_the_whole_report_and_nothing_else(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*SOUND, {"nothing": 1}, {"text": "x"}])
    assert run("check", file, "--json", "--fix", tmp_path / "b.jsonl") == 1
    tree = json.loads(capsys.readouterr().out)
    assert (tree["files"], tree["rows"], tree["kept"], tree["spoiled"]) == ([str(file)], 7, 6, True)
    assert tree["forms"] == {"messages": 5, "text": 1}
    (found,) = [f for f in tree["findings"] if f["kind"] == "form"]
    assert found["spoils"]
    assert (found["count"], found["places"][0]["where"]) == (1, f"{file}:6")
    assert sum(one["rows"] for one in tree["rows_by_tokens"]) == 6
    assert (tree["fixed"]["rows"], len(tree["longest_rows"])) == (6, 3)


def test_the_report_is_there_even_where_nothing_can_be_fixed(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"nothing": 1}])
    for more in ([], ["--json"]):
        assert run("check", file, "--fix", tmp_path / "b.jsonl", *more) == 2
        out, err = capsys.readouterr()
        assert "rows of no known form" in out
        assert "no row would be left, so nothing was written" in err
    assert json.loads(out)["fixed"] is None


def test_what_only_the_user_can_mend_is_said_with_the_fixed_set(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    rows = [*SOUND, {"messages": [{"role": "user", "content": "Now?"}, call]}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert run("check", file, "--fix", tmp_path / "b.jsonl") == 1
    assert capsys.readouterr().out.splitlines()[-2] == (
        "Left to you: chats that this checkpoint's template can't render: take another checkpoint or form"
    )


def test_a_row_that_is_no_chat_is_not_previewed_token_by_token(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 1_000_000}])
    assert run("preview", file) == 0
    assert (
        "a.jsonl:1 · broken: far too long to be a chat: 5,000,000 characters of text, 0 turns"
        in capsys.readouterr().out
    )


def test_a_configuration_gives_files_lengths_and_held_out_chats(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [*SOUND, chat("long " * 30, "Cut.")])
    held = write_jsonl(tmp_path / "h.jsonl", SOUND[:1])
    config = config_for(train, tmp_path, eval=str(held))
    assert run("check", "--config", config) == 1
    out = capsys.readouterr().out
    assert "6 rows (6 as messages): 6 kept, 1 cut to fit" in out
    assert f"{train}:1: held out at {held}:1" in out
    assert (
        run("check", train, "--held-out", write_jsonl(tmp_path / "o.jsonl", [chat("x", "y")]), "--config", config) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"Next: phinetune data preview {train} --config {config}; phinetune train {config}"
    )
    more = ["--set", "training_config.max_length=90", "--set", "data.split=the train"]
    assert run("check", held, "--config", config, *more) == 0
    options = " --set training_config.max_length=90 --set 'data.split=the train'"
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"Next: phinetune data preview {held} --config {config}{options}; phinetune train {config}{options}"
    )
    assert run("check", held, "--config", config) == 0  # the held-out chats alone are not compared with themselves
    spelt = tmp_path / "x" / ".." / held.name
    (tmp_path / "x").mkdir()
    assert run("check", spelt, "--config", config) == 0
    capsys.readouterr()
    same = config_for(train, tmp_path, eval=str(train))
    assert run("check", "--config", same) == 1
    assert "rows that stand in training and held-out chats (6)" in capsys.readouterr().out
    weighted = config_for(train, tmp_path, train=[{"path": str(train), "weight": 2}], eval=None)
    assert run("check", "--config", weighted) == 0


def test_a_preview_shows_rows_and_what_is_broken(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(chat("Hi", "Ho")) + "\n{\n" + json.dumps(chat("long " * 30, "Cut.")) + "\n")
    assert run("preview", file, "--config", config_for(file, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "      user │ «<|user|>»Hi«<|end|>»\n assistant │ «<|assistant|>»⟦Ho«<|end|>»«<|endoftext|>»⟧" in out
    assert f"{file}:2 · broken: broken JSON" in out
    assert "characters of this turn cut to fit" in out
    assert out.splitlines()[-1] == f"Next: phinetune data check {file} --config {tmp_path / 'run.yaml'}"
    assert run("preview", file, "--rows", 1, "--tokens") == 0
    out = capsys.readouterr().out
    assert "⟦H¦o¦«<|end|>»" in out
    assert ":2" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "no.jsonl", "b.txt"], "no.jsonl: no such file"),
        (["check"], "no file of chats"),
        (["check", "FILE", "--held-out", "no.csv"], "no.csv: no such file"),
        (["check", "FILE", "--fix", "out.csv"], "ends in .jsonl"),
        (["check", "FILE", "--config", "no.yaml"], "no.yaml: no such file"),
        (["check", "FILE", "--set", "data.loss=x"], "there is no key `loss`"),
        (["check", "FILE", "--set", "training_config.max_lenght=5"], "did you mean `max_length`?"),
        (["preview", "no.jsonl"], "no.jsonl: no such file"),
        (["preview", "FILE", "--set", "model.tokenizer=nowhere"], "no such folder"),
    ],
)
def test_a_mistake_is_a_sentence_and_status_2(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", SOUND)
    assert run(*(str(file) if argument == "FILE" else argument for argument in arguments)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_columns_are_proposed_and_written_as_a_configuration_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a table with columns of its own, by what each message says to do next."""
    file, config = tmp_path / "faq.csv", tmp_path / "run.yaml"
    file.write_text("Frage,Antwort,Nr\n" + "".join(f"Wie weit ist {i}?,{i} Meilen.,{i}\n" for i in range(20)))
    tiny = ["--set", f"model.path={TINY}"]
    config.write_text(f"data: {file}\n")
    assert cli_helpers.run(monkeypatch, "train", config, *tiny) == 2
    err = capsys.readouterr().err
    assert f"  data:\n    train: {file}\n    columns: {{user: Frage, assistant: Antwort}}\n" in err
    assert f"`phinetune data columns {file}` shows" in err
    assert cli_helpers.run(monkeypatch, "data", "columns", file, "--out", config) == 2
    assert "something stands there already" in capsys.readouterr().err
    config.unlink()
    assert cli_helpers.run(monkeypatch, "data", "columns", file, "--out", config) == 0
    out = capsys.readouterr().out
    assert "      user │ Wie weit ist 1?\n assistant │ 1 Meilen.\n" in out
    assert out.splitlines()[-1] == f"Next: phinetune data check --config {config}; phinetune train {config}"
    assert "  eval: 0.25\n" in config.read_text()
    assert "epochs" not in config.read_text()  # a rule chooses them, by the number of rows
    assert cli_helpers.run(monkeypatch, "data", "check", "--config", config, *tiny) == 0
    assert "columns not used: Nr (20)" in capsys.readouterr().out
    steps = ["--set", "training_config.max_steps=1", "--set", f"training_config.output_dir={tmp_path / 'run'}"]
    assert cli_helpers.run(monkeypatch, "train", config, *tiny, *steps, "--set", "evaluation.generate=false") == 0
    assert "columns: {user: " not in capsys.readouterr().err
    assert cli_helpers.run(monkeypatch, "data", "preview", file, *tiny, "--set", "data.columns={user: Fragen}") == 2
    assert "none is named `Fragen`; did you mean `Frage`?" in capsys.readouterr().err


def test_no_secret_reaches_the_output(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "sk-" + "proj-a1B2c3D4e5F6g7H8i9"
    file = write_jsonl(tmp_path / "a.jsonl", [*SOUND, chat("The key?", key), {"messages": [{"role": "x"}], "k": key}])
    for more in ([], ["--json"]):
        assert run("check", file, *more) == 1
        captured = capsys.readouterr()
        assert "API key" in captured.out
        assert key[3:] not in captured.out + captured.err
