"""A stranger's adapter: whichever way it is opened, what is absurd in it is refused before memory is taken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporting.merge.merge_helpers import adapted, save_base
from phinetune.checkpoints import load as loading
from phinetune.checkpoints.opened import open_model
from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import open_checkpoint
from phinetune.exporting.convert.convert import convert
from phinetune.exporting.merge.merge import merge_run

OPENERS: dict[str, Callable[[Path], Any]] = {
    "chat and evaluate": open_model,
    "merge": lambda folder: merge_run(folder, folder.parent / "merged"),
    "export": lambda folder: open_checkpoint(str(folder)),
    "convert": lambda folder: convert(folder, folder.parent / "lora.pt", "loralib"),
}
WITH_A_BASE = ("chat and evaluate", "merge", "export")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    adapted(save_base(folder / "base"), folder / "adapter", target_modules=["o_proj", "down_proj"])
    return folder / "adapter"


@pytest.fixture
def adapter(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil. Whoever loads the base's weights for it fails the test."""

    def fail(*_: Any) -> None:
        pytest.fail("the base was loaded")

    monkeypatch.setattr(loading, "_read_model", fail)
    shutil.copytree(whole, tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(way: str, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        OPENERS[way](folder)
    assert sorted(file.name for file in folder.parent.iterdir()) == ["adapter"]
    return str(caught.value)


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("way", OPENERS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "8"),
        ("r", 10**30),
        ("lora_alpha", float("nan")),
        ("rank_pattern", [1]),
        ("layer_replication", [[0, 4_000_000_000]]),
        ("layer_replication", [[0, 2]] * 100_000),
        ("modules_to_save", {"a": 1}),
        ("target_modules", 7),
        ("megatron_config", {"a": 1}),
    ],
)
def test_an_absurd_value_is_refused(adapter: Path, way: str, key: str, value: Any) -> None:
    configure(adapter, **{key: value})
    assert f"adapter_config.json: `{key}` should be " in refusal(way, adapter)


@pytest.mark.parametrize("way", WITH_A_BASE)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 10**9}, "adapter shape (4, 32) does not match the model's (1000000000, 32)"),
        ({"rank_pattern": {"o_proj": 2**31 - 1}}, "does not match the model's (2147483647, 32)"),
        ({"target_modules": "(.*)*x"}, "target_modules: `(.*)*x` was not matched within 0.3 s"),
        ({"rank_pattern": {"(.*)*x": 4}}, "rank_pattern: `(.*)*x` was not matched within 0.3 s"),
        ({"exclude_modules": "("}, "exclude_modules: `(` is no regular expression"),
        ({"modules_to_save": ["embed_tokens"]}, "missing: base_model.model.model.embed_tokens"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    adapter: Path, way: str, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.checkpoints.patterns.why_no_end.__defaults__", (0.3,))
    configure(adapter, **changes)
    assert words in refusal(way, adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_replication": [[0, 2], [1, 3]]}, "`layer_replication` needs 3 layers, and the base has 2"),
        ({"trainable_token_indices": [299, 300]}, "`trainable_token_indices` needs 301 tokens, and the base has 300"),
        ({"trainable_token_indices": {"embed_tokens": [999]}}, "needs 1000 tokens, and the base has 300"),
    ],
)
def test_what_the_base_lacks_is_named(adapter: Path, changes: dict[str, Any], words: str) -> None:
    configure(adapter, **changes)
    assert words in refusal("chat and evaluate", adapter)


@pytest.mark.parametrize("way", OPENERS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: struct.pack("<Q", 20 << 30) + data[8:],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: struct.pack("<Q", 4) + b"null",
    ],
    ids=["empty", "20 GB header", "cut", "more", "null"],
)
def test_a_spoiled_file_is_refused(adapter: Path, way: str, spoil: Callable[[bytes], bytes]) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    assert "adapter_model.safetensors: damaged (" in refusal(way, adapter)


@pytest.mark.parametrize("way", OPENERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_numbers_that_are_no_floating_point_are_refused(adapter: Path, way: str, dtype: torch.dtype) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    assert "weights of F32, BF16, F16, F64 can be read" in refusal(way, adapter)


@pytest.mark.parametrize("way", ["merge", "export"])
def test_a_copy_of_the_base_has_its_shape(adapter: Path, way: str) -> None:
    file = adapter / "adapter_model.safetensors"
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**load_file(file), copy: torch.zeros(3, 3)}, file)
    assert "a copy of model.embed_tokens.weight has the shape (3, 3), and the base has (300, 32)" in refusal(
        way, adapter
    )


def test_a_pattern_without_an_end_is_not_converted(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.checkpoints.patterns.why_no_end.__defaults__", (0.3,))
    configure(adapter, alpha_pattern={"(.*)*x": 4})
    assert "alpha_pattern: `(.*)*x` was not matched" in refusal("convert", adapter)
