"""Shared by all tests: a two-layer, 32-wide Phi-3, a few chats, and a run trained on them."""

from __future__ import annotations

import copy
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Nothing here may reach for the hub; must be set before transformers and datasets are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Without a device Triton's kernels are interpreted; must be set before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import support_recorder
from exporting.hub.hub_helpers import Hub, point_at, serve_hub
from helpers import SHARED, TINY, chat, tiny_config, write_jsonl
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.config.model import ModelSection
from phinetune.engine.kernels.native.operator import chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    support_recorder.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    support_recorder.register(config)


@pytest.fixture(autouse=True, scope="session")
def _kernels() -> None:
    """The native kernels are compiled before the first test: no test takes that time, and no test's log says so."""
    chosen()


# Of the properties in tests/soak: a few inputs, always the same; with --hypothesis-profile=soak thousands of new ones.
set_hypothesis_home_dir(tempfile.gettempdir())
settings.register_profile("few", max_examples=12, deadline=None, derandomize=True, database=None)
settings.register_profile("soak", max_examples=2000, deadline=None, database=None, print_blob=True)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Tiny models are fastest on one thread, above all beside other work; the starter is not tiny."""
    torch.set_num_threads(2 if request.node.get_closest_marker("starter") else 1)


@pytest.fixture(autouse=True, scope="session")
def _same_dtype_everywhere() -> Iterator[None]:
    """`dtype: auto` is float32 in every test, whatever this machine's processor multiplies fastest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phinetune.checkpoints.device.has_native_bf16", lambda device: False)
        yield


@pytest.fixture(autouse=True)
def _no_own_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run adds no handlers; phinetune's lines count from INFO on in every test, whatever ran before it."""
    logging.getLogger("phinetune").setLevel(logging.INFO)
    monkeypatch.setattr("phinetune.api.train.set_up_logging", lambda level="info": None)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Twelve chats of unlike length, one in four of them in two exchanges, with a system message in every third."""
    return [
        chat(
            f"How many are {i} and {i}? " + "Please. " * (i % 5),
            f"They are {2 * i}.",
            *(["And one more?", f"{2 * i + 1}!"] if i % 4 == 0 else []),
            system="You count." if i % 3 == 0 else None,
        )
        for i in range(12)
    ]


@pytest.fixture(scope="session")
def chats(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture
def tiny() -> Loaded:
    return load_base(ModelSection(path=TINY))


@pytest.fixture
def console() -> Console:
    """A console that is no terminal and keeps what it was given (`console.file.getvalue()`)."""
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="session")
def tiny_run(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints and evaluations in between. Read it; don't write into it."""
    from phinetune.api.train import train_config

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config(chats, folder, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=3)
    train_config(config, Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="session")
def _phi3_tokenizer() -> PreTrainedTokenizerBase:
    folder = SHARED / "phi3-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"the real Phi-3 tokenizer is not at {folder}")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.fixture
def phi3_tokenizer(_phi3_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The real Phi-3 tokenizer with the Phi-3.5 template; it lies outside the repository. A copy for each test."""
    return copy.deepcopy(_phi3_tokenizer)


@pytest.fixture(scope="session")
def starter_folder() -> Path:
    """The starter model in the user's cache, made there on the first use."""
    from phinetune.checkpoints.starter import ensure_starter

    return ensure_starter()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on loopback, which huggingface_hub here takes for the real one; alice's token is set."""
    with serve_hub() as server:
        point_at(server, monkeypatch, tmp_path / "hf-home")
        yield server
