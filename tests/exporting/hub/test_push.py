"""`phinetune push` puts a run on the hub. Others can load it, and they see nothing that is private."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants, snapshot_download
from peft import PeftModel
from transformers import AutoTokenizer, Phi3ForCausalLM

import phinetune
from cli.cli_helpers import run
from exporting.hub.hub_helpers import READ_TOKEN, TOKEN, Hub, Repo
from exporting.merge.merge_helpers import adapted, logits, save_base
from helpers import ADAPTER_FILES, TINY, tiny_config
from phinetune.checkpoints.adapters import BASE_FILE
from phinetune.checkpoints.opened import open_model
from phinetune.errors import ModelError
from phinetune.exporting.hub import published


def blocks(card: bytes, kind: str) -> list[str]:
    """The code in a card."""
    return [part.split("```")[0] for part in card.decode().split(f"```{kind}\n")[1:]]


# -- what is pushed --------------------------------------------------------------------------------------------


def test_a_run_is_pushed_and_fetched_and_loaded_by_peft(hub: Hub, tiny_run: Path, tmp_path: Path) -> None:
    done = phinetune.push(tiny_run, "alice/tiny")
    repo = hub.repos["alice/tiny"]
    assert repo.private
    assert repo.files.keys() == ADAPTER_FILES == set(done.files)
    assert repo.commits == ["Push with phinetune"]
    assert (done.repo, done.url) == ("alice/tiny", f"{hub.url}/alice/tiny")
    assert done.size == sum(map(len, repo.files.values()))

    fetched = Path(snapshot_download("alice/tiny", endpoint=hub.url, token=hub.token))
    base, _ = phinetune.load(TINY, dtype="float32", device="cpu")
    wanted = logits(open_model(tiny_run, dtype="float32", device="cpu").model)
    assert not torch.allclose(logits(base), wanted)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(fetched)).eval()), wanted)
    torch.testing.assert_close(logits(open_model(fetched, dtype="float32", device="cpu").model), wanted)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_run, fetched))
    assert ours.chat_template == theirs.chat_template


def test_the_code_in_the_card_runs(hub: Hub, tmp_path: Path, chats: Path) -> None:
    """On a base that is on the hub, in a process of its own, from an empty folder."""
    hub.add_folder("alice/base", save_base(tmp_path / "base"))
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.model.path = "alice/base"
    made = phinetune.api.train.train_config(config, phinetune.api.train.Console(quiet=True))
    assert "it is not on the hub" not in phinetune.push(made.path, "mine").report()
    card = hub.repos["alice/mine"].files["README.md"]
    front = yaml.safe_load(card.decode().split("---\n")[1])
    assert front["base_model"] == "alice/base"
    assert f"(revision `{hub.repos['alice/base'].sha}`)" in card.decode()

    (code,) = blocks(card, "python")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_commands_in_the_card_fit_what_export_writes(
    hub: Hub, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phinetune.push(tiny_run, "tiny")
    monkeypatch.chdir(tmp_path)
    _, llama, ollama = (block.split("\n") for block in blocks(hub.repos["alice/tiny"].files["README.md"], "sh"))
    snapshot_download("alice/tiny", endpoint=hub.url, token=hub.token, local_dir="tiny")
    assert run(monkeypatch, *llama[0].split()[1:]) == 0
    assert Path(llama[1].split()[2]).is_file()
    assert run(monkeypatch, *ollama[0].split()[1:]) == 0
    assert Path(ollama[1].split()[4]).is_file()
    assert ollama[2].split()[2] == ollama[1].split()[2] == "tiny"


def test_a_merged_run_is_pushed_as_one_model(hub: Hub, tiny_run: Path, tmp_path: Path) -> None:
    phinetune.push(tiny_run, "alice/whole", merged=True)
    repo = hub.repos["alice/whole"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "merged.json", "README.md"} <= repo.files.keys()
    assert not any(name.startswith("adapter") for name in repo.files)
    fetched = snapshot_download("alice/whole", endpoint=hub.url, token=hub.token)
    model = Phi3ForCausalLM.from_pretrained(fetched, dtype=torch.float32).eval()
    wanted = logits(open_model(tiny_run, dtype="float32", device="cpu").model)
    torch.testing.assert_close(logits(model), wanted)
    (code,) = blocks(repo.files["README.md"], "python")
    assert 'AutoModelForCausalLM.from_pretrained("alice/whole", dtype="auto")' in code
    for heading in ("## Data", "## Training", "## Results on held-out chats", "| | base | tuned |", "peft_config:"):
        assert heading in repo.files["README.md"].decode()


def test_a_checkpoint_and_another_tools_adapter_are_pushed_too(hub: Hub, tiny_run: Path, tmp_path: Path) -> None:
    phinetune.push(tiny_run / "checkpoint-4", "alice/four")
    assert hub.repos["alice/four"].files.keys() == ADAPTER_FILES
    card = hub.repos["alice/four"].files["README.md"].decode()
    assert "9 of 9 chats" in card
    assert "Results" not in card  # they are the finished run's

    adapted(save_base(tmp_path / "base"), tmp_path / "adapter", r=3)
    (tmp_path / "adapter" / BASE_FILE).unlink()
    done = phinetune.push(tmp_path / "adapter", "alice/theirs")
    assert set(done.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "the base `base` is not on the hub" in done.notes[0]
    assert "r: 3" in hub.repos["alice/theirs"].files["README.md"].decode()


def test_the_card_says_what_a_reader_of_the_hub_asks(hub: Hub, tiny_run: Path) -> None:
    phinetune.push(tiny_run, "alice/tiny")
    text = hub.repos["alice/tiny"].files["README.md"].decode()
    assert text.split("---\n")[2].startswith("\n# alice/tiny\n\nA LoRA adapter for `random:{layers: 2")
    assert "train: `chats.jsonl`, 9 of 9 chats" in text
    assert "| exact match % |" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["peft_config"]["r"] == 4
    assert settings["training_config"]["max_steps"] == 6
    assert settings["training_config"]["output_dir"] == "tiny"
    for words in ("hf download alice/tiny --local-dir tiny", "llama-cli -m", "ollama create"):
        assert words in text


# -- what is not -----------------------------------------------------------------------------------------------


def test_no_data_path_or_token_is_pushed(hub: Hub, tiny_run: Path, tmp_path: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    config = (folder / "config.yaml").read_text()
    assert str(chats) in config
    (folder / "config.yaml").write_text(config.replace("max_steps: 6", "max_steps: 6\n  hub_token: hf_secret"))
    results = json.loads((folder / "results.json").read_text())
    asked = results["examples"][0]["prompt"]
    phinetune.push(folder, "alice/tiny")
    repo = hub.repos["alice/tiny"]
    assert {"results.json", "metrics.jsonl", "run.log", "checkpoint-4"} & repo.files.keys() == set()
    for name, data in repo.files.items():
        for private in ("hf_secret", hub.token, str(chats.parent), str(tmp_path), asked):
            assert private.encode() not in data, (name, private)
    assert not [line for line in hub.requests if "hf_secret" in line]


def test_a_token_in_a_text_stops_the_push(hub: Hub, tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": hub.token}))
    assert "generation_config.json: your access token is in it" in refused(folder, "alice/tiny")
    assert not hub.repos


# -- a second push ---------------------------------------------------------------------------------------------


def test_a_second_push_replaces_the_first(hub: Hub, tiny_run: Path) -> None:
    repo = hub.repos.setdefault("alice/tiny", Repo(private=True))
    repo.files = {"adapter_model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    phinetune.push(tiny_run, "alice/tiny")
    assert repo.files.keys() == ADAPTER_FILES | {"notes.txt"}
    before = repo.files["adapter_model.safetensors"]
    phinetune.push(tiny_run / "checkpoint-4", "alice/tiny")
    assert repo.files["adapter_model.safetensors"] != before
    assert len(repo.commits) == 2


def test_an_adapter_and_a_model_are_not_mixed(hub: Hub, tiny_run: Path) -> None:
    phinetune.push(tiny_run, "alice/tiny")
    assert "holds an adapter, which would be loaded on top" in refused(tiny_run, "alice/tiny", merged=True)
    phinetune.push(tiny_run, "alice/whole", merged=True)
    assert "holds a model, and transformers would take it" in refused(tiny_run, "alice/whole")


def test_a_repository_is_private_unless_the_user_says_otherwise(hub: Hub, tiny_run: Path) -> None:
    assert phinetune.push(tiny_run, "alice/tiny").private
    assert hub.repos["alice/tiny"].private
    assert not phinetune.push(tiny_run, "alice/open", private=False).private
    assert not hub.repos["alice/open"].private


def test_what_is_public_gets_nothing_private(hub: Hub, tiny_run: Path) -> None:
    hub.repos["alice/tiny"] = Repo(private=False)
    assert "alice/tiny: exists and is public, so everyone would see" in refused(tiny_run, "alice/tiny")
    assert not hub.repos["alice/tiny"].files
    assert phinetune.push(tiny_run, "alice/tiny", private=False).report()[0].endswith("; public")


def test_a_private_repository_stays_private(hub: Hub, tiny_run: Path) -> None:
    hub.repos["alice/tiny"] = Repo(private=True)
    done = phinetune.push(tiny_run, "alice/tiny", private=False)
    assert (done.private, hub.repos["alice/tiny"].private) == (True, True)
    assert "it stays private" in done.notes[-1]
    assert done.report()[0].endswith("; private")


@pytest.mark.parametrize(("option", "private"), [([], True), (["--private"], True), (["--public"], False)])
def test_the_command_is_private_unless_told(
    hub: Hub, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], private: bool
) -> None:
    assert run(monkeypatch, "push", tiny_run, "alice/tiny", *option) == 0
    assert hub.repos["alice/tiny"].private is private


# -- refusals --------------------------------------------------------------------------------------------------


def refused(source: Path, repo: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        phinetune.push(source, repo, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (TOKEN, "bob/tiny", "bob/tiny: your access token may not write there (403: You don't"),
        (READ_TOKEN, "alice/there", "alice/there: your access token may not write there (403"),
        ("hf_wrong", "alice/tiny", "{url} does not know your access token (401)"),
    ],
    ids=["another owner", "another user", "unknown token"],
)
def test_what_the_hub_refuses_is_a_sentence(
    hub: Hub, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, words: str
) -> None:
    hub.add_folder("alice/there", tmp_path)
    monkeypatch.setenv("HF_TOKEN", token)
    assert words.format(url=hub.url) in refused(tiny_run, repo, private=False)
    assert list(hub.repos) == ["alice/there"]


def test_an_unknown_token_is_refused_before_the_merge(
    hub: Hub, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr(published, "merge_run", None)  # a merge would fail
    assert "(401)" in refused(tiny_run, "alice/tiny", merged=True)


def test_the_command_says_what_the_hub_refuses(
    hub: Hub, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run(monkeypatch, "push", tiny_run, "alice/tiny") == 2
    assert capsys.readouterr().err.startswith(f"error: {hub.url} does not know")


def test_a_hub_that_can_not_be_reached_is_a_sentence(hub: Hub, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 could not be reached" in refused(tiny_run, "alice/tiny")


def test_offline_mode_is_a_sentence(hub: Hub, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(tiny_run, "alice/tiny")


@pytest.mark.parametrize(
    ("place", "words"),
    [("none", "no such folder"), ("empty", "no adapter there"), ("merged", "a merged model; push the run")],
)
def test_what_is_no_run_is_refused_before_the_hub_is_asked(hub: Hub, tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merged.json").touch()
    assert words in refused(tmp_path / place, "alice/tiny")
    assert not hub.requests


@pytest.mark.parametrize("name", ["a/b/c", "alice/-x", "sp ace"])
def test_what_is_no_name_of_a_repository_is_refused_before_the_hub_is_asked(
    hub: Hub, tiny_run: Path, name: str
) -> None:
    assert refused(tiny_run, name).startswith("REPO: Repo id must")
    assert not hub.requests


# -- the token, and the command line ---------------------------------------------------------------------------


def test_the_token_is_found_where_the_guide_puts_it(
    hub: Hub, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    assert refused(tiny_run, "tiny").startswith("no access token: set HF_TOKEN, write HF_TOKEN=hf_… into .env, or")
    login = Path(constants.HF_TOKEN_PATH)
    login.parent.mkdir(parents=True, exist_ok=True)
    login.write_text(hub.token)
    assert phinetune.push(tiny_run, "by-login").repo == "alice/by-login"
    login.write_text("hf_wrong")
    Path(".env").write_text(f'# the hub\nHF_TOKEN="{hub.token}"\n')
    assert phinetune.push(tiny_run, "by-file").repo == "alice/by-file"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")  # the environment goes first
    assert "401" in refused(tiny_run, "tiny")


def test_the_command_says_what_it_pushed_and_how_it_is_used(hub: Hub, tiny_run: Path) -> None:
    """In a process of its own, where huggingface_hub reads HF_ENDPOINT itself."""
    command = [sys.executable, "-m", "phinetune", "push", str(tiny_run), "tiny", "--private"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Pushed the adapter to {hub.url}/alice/tiny: 9 files, ")
    assert lines[1].startswith("Note: the base `random:{layers: 2")
    assert lines[2:4] == ["Use it with:", "  hf download alice/tiny --local-dir tiny"]
    assert lines[4].endswith(" chat tiny")
    assert hub.repos["alice/tiny"].private
