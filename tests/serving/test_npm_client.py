"""Every call of the API by the official client for JavaScript, unmodified: tests/serving/contract.mjs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from chats.template_helpers import template_tokenizer
from helpers import TINY
from phinetune.config.model import ModelSection
from serving.serving_helpers import LIMIT_S, training_server

HERE = Path(__file__).resolve().parent
CLIENT = HERE.parents[1] / "node_modules" / "openai"


def test_the_client_for_javascript_finds_the_whole_api(tmp_path: Path) -> None:
    node = shutil.which("node")
    if not node or not CLIENT.is_dir():
        pytest.skip("node or its package `openai` is not there; `tools/npm_client.sh` installs it")
    template_tokenizer("phi-4-mini").save_pretrained(tmp_path / "tokenizer")
    models = {
        "tiny": ModelSection(path=TINY),
        "caller": ModelSection(path=TINY, tokenizer=str(tmp_path / "tokenizer")),
    }
    with training_server(tmp_path / "server", models) as client:
        given = {"OPENAI_BASE_URL": str(client.base_url), "OPENAI_API_KEY": client.api_key}
        done = subprocess.run(
            [node, str(HERE / "contract.mjs"), *models],
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all calls did what the API says"
