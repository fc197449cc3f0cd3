"""Adapters as other tools leave them are opened, evaluated, converted, merged and exported as our own are."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from exporting.merge.merge_helpers import adapted, logits, open_plain, save_base
from helpers import chat, tiny_config, train_only, write_jsonl
from phinetune.api.evaluate import evaluate
from phinetune.checkpoints.foreign_adapters import peft_folder, sixteen_bit_base
from phinetune.checkpoints.opened import open_model, recorded_config
from phinetune.config.model import ModelSection
from phinetune.errors import ModelError
from phinetune.exporting.convert.convert import convert
from phinetune.exporting.merge.merge import merge_run
from phinetune.exporting.targets import export

TARGETS = ["qkv_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("foreign") / "base")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))


def trl(base: Path, folder: Path) -> tuple[Path, PeftModel]:
    """`checkpoint-500` of TRL and of LLaMA-Factory: beside PEFT's files, the trainer's state and its pickles."""
    place = folder / "checkpoint-500"
    model = adapted(base, place, target_modules=TARGETS)
    (place / "base.json").unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (place / name).write_bytes(b"a pickle")
    (place / "trainer_state.json").write_text('{"global_step": 500}')
    return place, model


def unsloth(base: Path, folder: Path) -> tuple[Path, PeftModel]:
    """Unsloth's: target modules as one expression, what it patched, and a key that PEFT does not know yet."""
    place, model = trl(base, folder)
    change(
        place,
        target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:qkv_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:no)\.x)",
        auto_mapping={"base_model_class": "Phi3ForCausalLM", "parent_library": "transformers", "unsloth_fixed": True},
        a_key_of_tomorrow=None,
    )
    return place, model


def axolotl(base: Path, folder: Path) -> tuple[Path, PeftModel]:
    """axolotl's output folder, with its configuration and the base's own config.json beside the adapter."""
    model = adapted(base, folder, target_modules=TARGETS, use_rslora=True)
    (folder / "base.json").unlink()
    shutil.copyfile(base / "config.json", folder / "config.json")
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    return folder, model


def mlx(base: Path, folder: Path, old: bool = False) -> tuple[Path, PeftModel]:
    """mlx-lm's: transposed matrices under the layers' own names, and its settings in adapter_config.json."""
    model = adapted(base, folder / "peft", target_modules=TARGETS)  # alpha / r is 2
    tensors = {}
    for name, tensor in load_file(folder / "peft" / "adapter_model.safetensors").items():
        layer, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        tensors[f"{layer}.lora_{part.lower()}"] = tensor.T.contiguous()
    shutil.rmtree(folder / "peft")
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    save_file(tensors, folder / "0000100_adapters.safetensors")
    numbers = {"rank": 4, "scale": 0.5, "alpha": 16, "dropout": 0.0} if old else {"rank": 4, "scale": 2.0}
    layers = {"lora_layers": 2} if old else {"num_layers": 2, "fine_tune_type": "lora"}
    config = {"model": str(base), "adapter_path": "adapters", "lora_parameters": numbers, "iters": 600, **layers}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, model


def old_mlx(base: Path, folder: Path) -> tuple[Path, PeftModel]:
    return mlx(base, folder, old=True)


def change(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


TOOLS = [trl, unsloth, axolotl, mlx, old_mlx]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_a_tools_adapter_is_opened_merged_and_exported(tool: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder, theirs = tool(base, tmp_path / "a")
    wanted = logits(theirs)
    opened = open_model(folder, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(opened.model), wanted, rtol=1e-4, atol=1e-5)
    merge_run(folder, tmp_path / "merged")
    torch.testing.assert_close(logits(open_plain(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-5)
    for target in ("gguf", "gguf-lora"):
        assert export(str(folder), target, kind="f32", out=tmp_path / f"a.{target}").size > 0


@pytest.mark.parametrize("tool", [trl, mlx], ids=lambda tool: tool.__name__)
def test_a_tools_adapter_is_evaluated_and_converted(tool: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder, theirs = tool(base, tmp_path / "a")
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"{i}?", f"{i}!") for i in range(3)])
    quiet = Console(file=io.StringIO())
    found = evaluate(str(folder), str(rows), {"generate": False}, console=quiet, dtype="float32", device="cpu")
    assert found.results["tuned"]["loss"] != found.results["base"]["loss"]
    convert(folder, tmp_path / "split", "peft-split")
    convert(folder, tmp_path / "lora.pt", "loralib")
    convert(tmp_path / "lora.pt", tmp_path / "again", "peft", lora_alpha=8, base=str(base))
    if tool is mlx:
        convert(folder, tmp_path / "as-peft", "peft")
        theirs_again = PeftModel.from_pretrained(open_plain(base), str(tmp_path / "as-peft"))
        torch.testing.assert_close(logits(theirs_again), logits(theirs), rtol=1e-4, atol=1e-5)
    opened = open_model(tmp_path / "again", dtype="float32", device="cpu")
    torch.testing.assert_close(logits(opened.model), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tool", [trl, mlx], ids=lambda tool: tool.__name__)
def test_training_goes_on_from_a_tools_adapter_on_the_base_that_it_names(tool: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder, _ = tool(base, tmp_path / "a")
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"{i}?", f"{i}!") for i in range(8)])
    config = tiny_config(rows, tmp_path / "run", max_steps=1, learning_rate=0.0)
    config.model = ModelSection(adapter=str(folder), dtype="float32", device="cpu")
    config.peft_config = {}
    config.data.eval = None
    train_only(config)
    wanted = logits(open_model(folder, dtype="float32", device="cpu").model)
    found = logits(open_model(tmp_path / "run", dtype="float32", device="cpu").model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run" / "base.json").read_text())["path"] == str(base)


def test_an_mlx_adapter_is_written_in_pefts_form_once(base: Path, tmp_path: Path) -> None:
    folder, _ = mlx(base, tmp_path / "a")
    made = peft_folder(folder)
    assert made.is_relative_to(tmp_path / "home")
    before = (made / "adapter_model.safetensors").stat().st_mtime_ns
    assert peft_folder(folder) == made
    assert (made / "adapter_model.safetensors").stat().st_mtime_ns == before
    change(folder, lora_parameters={"rank": 4, "scale": 3.0})
    assert peft_folder(folder) != made


def test_what_can_not_be_opened_is_told_with_what_to_do(base: Path, tmp_path: Path) -> None:
    def told(path: Path) -> str:
        with pytest.raises(ModelError) as caught:
            open_model(path)
        return str(caught.value)

    (tmp_path / "lora.pt").write_bytes(b"")
    assert "--to peft --lora-alpha ALPHA --base BASE" in told(tmp_path / "lora.pt")
    place, _ = trl(base, tmp_path / "run")
    shutil.copytree(place, tmp_path / "run" / "checkpoint-1000")
    assert f"in 2 of its checkpoints; give one, such as {tmp_path / 'run' / 'checkpoint-1000'}" in told(
        tmp_path / "run"
    )
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    assert "adapter_model.bin, which is pickled" in told(place)
    folder, _ = mlx(base, tmp_path / "mlx")
    for changes, words in (
        ({"fine_tune_type": "dora"}, "fine_tune_type is dora; only lora is read"),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}, "must have a scale and a rank"),
    ):
        change(folder, **changes)
        assert words in told(folder)
    change(folder, lora_parameters={"rank": 4, "scale": 2.0})
    tensors = load_file(folder / "adapters.safetensors")
    tensors["model.layers.0.mlp.down_proj.m"] = torch.ones(32)
    tensors.pop("model.layers.1.mlp.down_proj.lora_b")
    save_file(tensors, folder / "adapters.safetensors")
    text = told(folder)
    assert "model.layers.0.mlp.down_proj.m: no lora_a or lora_b" in text
    assert "model.layers.1.mlp.down_proj: lora_a and lora_b don't fit" in text


def test_a_base_in_nf4_is_read_from_the_16_bit_one_and_quantised(base: Path, tmp_path: Path) -> None:
    folder, _ = trl(base, tmp_path)
    change(folder, base_model_name_or_path="unsloth/Phi-3-mini-4k-instruct-bnb-4bit")
    model = recorded_config(folder).model
    assert (model.path, model.quantization) == ("unsloth/Phi-3-mini-4k-instruct", "nf4")
    for other in ("unsloth/Phi-4-unsloth-bnb-4bit", "microsoft/phi-4"):
        assert sixteen_bit_base(other) == (other, {})
