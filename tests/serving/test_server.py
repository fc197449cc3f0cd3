"""Where a server may listen, with which key, and that a folder has one server."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from helpers import TINY
from phinetune.config.model import ModelSection
from phinetune.errors import ConfigError, PhinetuneError, RunError
from phinetune.serving.server import _listening, check_place, is_loopback, own_key, running_state
from phinetune.serving.settings import ServerSettings, make_settings


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "box.lan", "::", ""])
def test_others_are_let_in_with_a_key_of_the_users_own(host: str) -> None:
    with pytest.raises(ConfigError, match="TLS"):
        check_place(ServerSettings(host=host), None)
    check_place(ServerSettings(host=host), "a-key-that-is-long-enough")
    with pytest.raises(ConfigError, match="at least 16"):
        check_place(ServerSettings(host=host), "short")
    assert not is_loopback(host)


def test_the_key_is_made_once_and_for_the_user_alone(tmp_path: Path) -> None:
    check_place(ServerSettings(), None)
    key = own_key(tmp_path)
    assert len(key) > 40
    assert own_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert own_key(tmp_path / "other") != key


def test_a_folder_has_one_server_and_what_was_never_acknowledged_is_gone(tmp_path: Path) -> None:
    settings = ServerSettings(folder=tmp_path)
    with running_state(settings) as state:
        assert stat.S_IMODE((tmp_path / "server.sqlite").stat().st_mode) == 0o600
        with pytest.raises(RunError, match="another server has this folder"), running_state(settings):
            pass
        (tmp_path / "files" / "file-half.jsonl").write_text("{")
        assert state.models.base_names == ["starter"]
    with running_state(settings):
        assert list((tmp_path / "files").iterdir()) == []


def test_models_are_named_on_the_command_line(tmp_path: Path) -> None:
    def models(*texts: str) -> dict[str, str]:
        made = make_settings(texts, "127.0.0.1", 0, tmp_path, (), None, False)
        return {name: section.path for name, section in made.models.items()}

    assert models() == {"starter": "starter"}
    assert models("starter", f"mini={tmp_path}") == {"starter": "starter", "mini": str(tmp_path)}
    for wrong in (["a/b"], ["a=x", "a=y"], ["=x"]):
        with pytest.raises(PhinetuneError):
            models(*wrong)


def test_a_base_that_cannot_lie_in_q8_0_is_refused_at_the_start(tmp_path: Path) -> None:
    def start(weights: str, **section: Any) -> str:
        models = {"a": ModelSection(path=TINY, **section)}
        return make_settings(models, "127.0.0.1", 0, tmp_path, (), None, False, weights=weights).weights

    assert start("q8_0", device="cpu") == "q8_0"
    with pytest.raises(ConfigError, match="held in nf4 already"):
        start("q8_0", device="cpu", quantization="nf4")
    with pytest.raises(ConfigError, match="is none of auto, q8_0"):
        start("q4_0")


def test_an_answer_waits_for_no_receipt_of_its_head() -> None:
    with _listening(ServerSettings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
