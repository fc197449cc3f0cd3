"""Access tokens are told nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from phinetune.config.run import RunConfig, dump_config
from phinetune.logs import SafeFormatter, log_file
from phinetune.secret_text import HIDDEN, is_secret_name, tree_without_secrets, without_secrets

TOKENS = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "OpenAI": "sk-proj-" + "aB3_" * 8,
    "Anthropic": "sk-ant-api03-" + "aB3-" * 8,
    "GitHub": "ghp_" + "aB3" * 12,
    "GitHub, fine-grained": "github_pat_" + "aB3_" * 15,
    "AWS": "AKIA" + "ABCD" * 4,
    "Google": "AIza" + "aB3-_" * 7,
    "Slack": "xoxb-1234567890-abc",
    "a password in an address": "joe:pass-word",
}


@pytest.mark.parametrize("token", [pytest.param(token, id=name) for name, token in TOKENS.items()])
def test_tokens_are_known_by_their_form(token: str) -> None:
    text = f"reading https://{token}@host.example/x failed"
    assert token not in without_secrets(text)
    assert HIDDEN in without_secrets(text)


def test_a_variable_of_the_environment_is_a_secret_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "no-known-form")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("DB_PASSWORD", "short")
    text = "no-known-form 0123456789abcdef short"
    assert without_secrets(text) == f"{HIDDEN} {HIDDEN} short"


@pytest.mark.parametrize(
    "text", ["sk-learn", "hf_model", "https://host:8080/x", "a@b.example", "max_new_tokens: 5", ""]
)
def test_usual_text_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_names_of_secrets() -> None:
    secret = ["hub_token", "HF_TOKEN", "OPENAI_API_KEY", "apikey", "aws_secret_access_key", "password", "Token"]
    assert [name for name in secret if not is_secret_name(name)] == []
    usual = [
        "eos_token",
        "pad_token",
        "max_new_tokens",
        "tokenizer",
        "key",
        "special_tokens",
        "tokens",
        "passwords_seen",
    ]
    assert [name for name in usual if is_secret_name(name)] == []


def test_a_tree_keeps_its_form() -> None:
    tree = {"a": [{"api_key": "x", "n": 1, "token": None}], "b": TOKENS["OpenAI"], "eos_token": "<|end|>"}
    assert tree_without_secrets(tree) == {
        "a": [{"api_key": HIDDEN, "n": 1, "token": None}],
        "b": HIDDEN,
        "eos_token": "<|end|>",
    }


@pytest.mark.parametrize("key", ["hub_token", "run_name", "report_to"])
def test_a_dumped_configuration_tells_none(key: str) -> None:
    config = RunConfig.model_validate({"training_config": {key: TOKENS["Hugging Face"]}})
    assert TOKENS["Hugging Face"] not in dump_config(config)


def test_a_log_tells_no_token_and_nothing_in_it_acts(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    with log_file(file):
        logging.getLogger("phinetune").warning("%s: \x1b[2J token %s", "a\rb", TOKENS["GitHub"])
        try:
            raise ValueError(f"\x1b]0;x\x07 {TOKENS['OpenAI']}")
        except ValueError:
            logging.getLogger("phinetune").exception("no")
    text = file.read_text(encoding="utf-8")
    assert text.replace("\n", "").isprintable()
    assert "a␍b: ␛[2J token (secret)" in text
    assert "ValueError: ␛]0;x␇ (secret)" in text
    assert file.stat().st_mode & 0o777 == 0o600


def test_other_handlers_get_the_same_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s", ("\u202e",), None)
    assert SafeFormatter().format(record).endswith("�")
