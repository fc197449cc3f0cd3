"""`push_to_hub` of an older script: one push at the run's end, by the rules of `phinetune push`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from exporting.hub.hub_helpers import Hub, Repo
from helpers import ADAPTER_FILES, tiny_config
from phinetune.api.plan import plan_config
from phinetune.api.train import train_config
from phinetune.config.run import RunConfig, load_config
from phinetune.errors import PhinetuneError
from phinetune.screen.console import Console


def with_hub(chats: Path, folder: Path, **keys: Any) -> RunConfig:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True, **keys}
    config = tiny_config(chats, folder / "my-run", **settings)
    config.evaluation.enabled = False
    return config


def train(config: RunConfig) -> Any:
    return train_config(config, Console(quiet=True))


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_the_adapter_goes_to_a_private_repository_once_at_the_end(
    hub: Hub, chats: Path, tmp_path: Path, strategy: str
) -> None:
    keys = {"hub_model_id": "alice/mine", "hub_strategy": strategy, "hub_always_push": True}
    made = train(with_hub(chats, tmp_path, **keys))
    repo = hub.repos["alice/mine"]
    assert repo.private
    assert repo.files.keys() == ADAPTER_FILES
    assert repo.commits == ["Push with phinetune"]
    assert list(hub.repos) == ["alice/mine"]
    assert "goes to the private repository alice/mine once, at the end" in (made.path / "run.log").read_text()


def test_only_the_user_makes_it_public(hub: Hub, chats: Path, tmp_path: Path) -> None:
    train(with_hub(chats, tmp_path, hub_private_repo=False))
    assert not hub.repos["alice/my-run"].private  # named after the run's folder


def test_a_token_of_the_script_is_used_and_never_written_down(
    hub: Hub, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    made = train(with_hub(chats, tmp_path, push_to_hub_token=hub.token))
    assert hub.repos["alice/my-run"].files
    texts = [file for file in made.path.rglob("*") if file.is_file()]
    assert not [file.name for file in texts if hub.token.encode() in file.read_bytes()]
    assert "push_to_hub_token" not in load_config(made.path / "config.yaml").training_config


@pytest.mark.parametrize("way", [train, plan_config], ids=["train", "plan"])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hub_model_id": "a/b/c"}, "training_config.hub_model_id: Repo id must"),
        ({"hub_model_id": "alice/sp ace"}, "training_config.hub_model_id: Repo id must"),
        ({"hub_revision": "v2"}, "training_config.hub_revision: a run is pushed to the branch main"),
        ({"hub_strategy": "sometimes"}, "training_config.hub_strategy: it should be one of end, every_save"),
        ({"hub_token": 7}, "training_config.hub_token: it should be a valid string"),
    ],
)
def test_what_can_be_known_is_refused_before_training(
    hub: Hub, chats: Path, tmp_path: Path, way: Callable[[RunConfig], Any], keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(PhinetuneError) as caught:
        way(with_hub(chats, tmp_path, **keys))
    assert words in str(caught.value)
    assert not hub.requests
    assert not (tmp_path / "my-run").exists()


@pytest.mark.parametrize("way", [train, plan_config], ids=["train", "plan"])
def test_without_a_token_or_offline_it_does_not_begin(
    hub: Hub, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[RunConfig], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PhinetuneError, match=r"^training_config\.push_to_hub: no access token"):
        way(with_hub(chats, tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PhinetuneError, match="HF_HUB_OFFLINE is set"):
        way(with_hub(chats, tmp_path, hub_token="hf_mine"))
    assert not (tmp_path / "my-run").exists()


def test_a_push_that_fails_leaves_a_whole_run(hub: Hub, chats: Path, tmp_path: Path) -> None:
    hub.repos["alice/my-run"] = Repo(private=False)
    with pytest.raises(PhinetuneError) as caught:
        train(with_hub(chats, tmp_path))
    first, last = caught.value.problems
    assert "exists and is public" in first
    assert f"finished and whole, and only its push failed; push it with `phinetune push {tmp_path}/my-run" in last
    assert (tmp_path / "my-run" / "results.json").is_file()
    assert not hub.repos["alice/my-run"].files


def test_without_push_to_hub_nothing_leaves_the_machine(hub: Hub, chats: Path, tmp_path: Path) -> None:
    made = train(with_hub(chats, tmp_path, push_to_hub=False, hub_model_id="alice/mine"))
    assert not hub.requests
    assert "`hub_model_id` has no effect: it is for `push_to_hub: true`" in (made.path / "run.log").read_text()
