"""How an adapter begins: the base in a comparison is the base, and a changed base leaves a plain adapter behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import TINY, tiny_config, train_only
from phinetune.api.evaluate import evaluate
from phinetune.api.train import train_config
from phinetune.checkpoints.adapters import usable_adapter
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.untouched import untouched_base
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.engine.scoring import Score, score_rows
from phinetune.errors import ConfigError, ModelError, RunError
from phinetune.exporting.merge.merge import merge_run
from phinetune.manifest import write_manifest
from phinetune.screen.console import silent
from phinetune.training.prepare import prepare_run, settle

# Starts that take A and B out of the base's weights.
MOVED = ["pissa", "pissa_niter_3", "olora"]
# Settings that train beside or inside the base, or change it. None of them may change what `base` stands for.
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"init_lora_weights": name} for name in MOVED},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dora": {"use_dora": True, "init_lora_weights": "olora"},
    "kasa": {"kasa_config": {"beta": 1e-4}},
    "layers twice": {"layer_replication": [[0, 2], [1, 2]]},
    "head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "single tokens": {"trainable_token_indices": [1, 2, 3, 4, 97, 98]},
    "bare parameters": {"target_modules": ["o_proj"], "target_parameters": ["qkv_proj.weight"]},
    "biases, of which there are none": {"bias": "all"},
}


def config_of(chats: Path, folder: Path, lora: dict[str, Any], **training: Any) -> RunConfig:
    config = tiny_config(chats, folder, **training)
    config.peft_config.update(lora)
    config.evaluation.generate = False
    return config


def loss_of_base(config: RunConfig) -> float:
    """The loss of the base, loaded alone and computed by the engine of the run."""
    prepared = prepare_run(settle(config))
    assert prepared.chats.held_out
    base = load_base(config.model, fast=prepared.engine.fast is not None).model
    return sum(score_rows(base, prepared.chats.held_out.encoded), Score()).loss


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_base_is_the_base(lora: dict[str, Any], chats: Path, tmp_path: Path) -> None:
    config = config_of(chats, tmp_path / "run", lora)
    made = train_config(config, silent()).results["evaluation"]
    assert made["base"]["loss"] == loss_of_base(config)
    assert made["tuned"]["loss"] < made["base"]["loss"]


@pytest.mark.parametrize("name", ["pissa_niter_3", "kasa", "layers twice", "single tokens", "mica"])
def test_an_evaluation_later_measures_the_same_two_models(name: str, chats: Path, tmp_path: Path) -> None:
    config = config_of(chats, tmp_path / "run", KINDS[name])
    made = train_config(config, silent()).results["evaluation"]
    again = evaluate(tmp_path / "run", console=silent(), record=False).results
    assert again["base"]["loss"] == pytest.approx(made["base"]["loss"], rel=1e-7)
    assert again["tuned"]["loss"] == pytest.approx(made["tuned"]["loss"], rel=1e-5)


PATTERNS = {"r": 4, "rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"down_proj": 3}}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "drawn": {"init_lora_weights": "pissa_niter_3"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora and patterns": {"use_rslora": True, **PATTERNS},  # PEFT's own conversion refuses these
    "dora": {"use_dora": True},
    "a whole module beside it": {"modules_to_save": ["norm"]},  # PEFT's own conversion loses it
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_saved_adapter_on_the_base_is_the_tuned_model(shape: dict[str, Any], chats: Path, tmp_path: Path) -> None:
    trained = train_only(config_of(chats, tmp_path / "run", {"init_lora_weights": "pissa", **shape}, max_steps=3))
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        wanted = trained.model(ids).logits
        loaded = PeftModel.from_pretrained(load_base(ModelSection(path=TINY)).model, str(tmp_path / "run"))
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(open_model(tmp_path / "run").model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        with loaded.disable_adapter():
            assert torch.equal(loaded(ids).logits, load_base(ModelSection(path=TINY)).model(ids).logits)


def test_plain_engine_saves_the_same_adapter(chats: Path, tmp_path: Path) -> None:
    folders = []
    for kind in ("fast", "plain"):
        config = config_of(chats, tmp_path / kind, {"init_lora_weights": "pissa"})
        config.engine.kind = kind
        train_only(config)
        folders.append(load_file(tmp_path / kind / "adapter_model.safetensors"))
    assert folders[0].keys() == folders[1].keys()
    for name, tensor in folders[0].items():
        torch.testing.assert_close(tensor, folders[1][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", MOVED)
def test_resumed_is_as_if_it_had_never_stopped(start: str, chats: Path, tmp_path: Path) -> None:
    lora = {"init_lora_weights": start}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    saving = {"save_strategy": "steps", "save_steps": 3}
    train_only(config_of(chats, whole, lora, **saving))
    train_only(config_of(chats, stopped, lora, **saving))
    shutil.rmtree(stopped / "checkpoint-6")
    (stopped / "adapter_model.safetensors").unlink()
    train_only(config_of(chats, stopped, lora, **saving), resume=True)
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_checkpoint_that_began_elsewhere_is_refused(chats: Path, tmp_path: Path) -> None:
    config = config_of(chats, tmp_path / "run", {"init_lora_weights": "pissa"}, save_strategy="steps", save_steps=3)
    train_only(config)
    file = tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name][0, -1] += 1e-4
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(file.parent)
    with pytest.raises(RunError, match="began with other values") as told:
        train_only(config, resume=True)
    assert told.value.problems[1:] == [name]


def test_the_best_checkpoint_is_the_one_that_is_left(chats: Path, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    config = config_of(chats, tmp_path / "run", {"init_lora_weights": "olora"}, save_strategy="steps", **best)
    config.training_config["learning_rate"] = 0.5  # it gets worse from step to step
    made = train_config(config, silent()).results
    step = made["training"]["best"]["step"]
    kept, left = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "run" / f"checkpoint-{step}", tmp_path / "run")
    )
    assert all(torch.equal(left[name], tensor) for name, tensor in kept.items())
    assert made["evaluation"]["tuned"]["loss"] == pytest.approx(made["training"]["best"]["value"], rel=1e-4)


def test_a_merge_of_the_run_is_the_tuned_model(chats: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "base"
    base = load_base(ModelSection(path=TINY))
    base.model.save_pretrained(checkpoint)
    base.tokenizer.save_pretrained(checkpoint)
    config = config_of(chats, tmp_path / "run", {"init_lora_weights": "pissa"})
    config.model.path = str(checkpoint)
    trained = train_only(config)
    merge_run(tmp_path / "run", tmp_path / "merged")
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        merged = load_base(ModelSection(path=str(tmp_path / "merged"))).model
        torch.testing.assert_close(merged(ids).logits, trained.model(ids).logits, rtol=1e-3, atol=1e-3)


def test_what_is_saved_says_nothing_of_its_start(chats: Path, tmp_path: Path) -> None:
    trained = train_only(config_of(chats, tmp_path / "run", {"init_lora_weights": "pissa"}))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 16)
    assert "plain LoRA adapter of twice the rank" in trained.prepared.settings.notes[-1]


def test_biases_that_there_are_none_of_are_told(chats: Path, tmp_path: Path) -> None:
    assert settle(config_of(chats, tmp_path, {})).settings.notes == []
    notes = settle(config_of(chats, tmp_path, {"bias": "lora_only"})).settings.notes
    assert notes == ["peft_config.bias: lora_only trains nothing more, since Phi-3 has no biases"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "eva": ({"init_lora_weights": "eva"}, "`eva` can't be had: it looks at activations"),
    "corda": ({"init_lora_weights": "corda"}, "`corda` can't be had"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "`lora_ga` can't be had"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "set model.quantization: nf4"),
    "a typo": ({"init_lora_weights": "pisa"}, "did you mean `pissa`?"),
    "other letters": ({"init_lora_weights": "PiSSA"}, "did you mean `pissa`?"),
    "no number": ({"init_lora_weights": "pissa_niter_x"}, "did you mean `pissa_niter_16`?"),
    "the letter": ({"init_lora_weights": "pissa_niter_N"}, "did you mean `pissa_niter_16`?"),
    "a number": ({"init_lora_weights": 1}, "`1` is none of true, false, gaussian"),
    "nothing": ({"init_lora_weights": None}, "`None` is none of"),
    "settings of another start": ({"eva_config": {"rho": 2}}, "peft_config.eva_config belongs to"),
}


@pytest.mark.parametrize(("lora", "said"), REFUSED.values(), ids=REFUSED)
def test_a_start_that_a_run_can_not_perform_is_refused(
    lora: dict[str, Any], said: str, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        settle(config_of(chats, tmp_path / "run", lora))
    assert any(said in problem for problem in told.value.problems)


def test_an_adapter_of_others_that_began_by_chance_is_not_loaded(tmp_path: Path) -> None:
    """PEFT would take other numbers out of the base than before training, and say nothing."""
    loaded = load_base(ModelSection(path=TINY))
    start: Any = "pissa_niter_2"
    lora = LoraConfig(r=2, init_lora_weights=start, target_modules=["o_proj"], task_type="CAUSAL_LM")
    get_peft_model(loaded.model, lora).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="which changed the base's weights"):
        usable_adapter(tmp_path, ModelSection(path=TINY))


def test_an_adapter_of_others_is_compared_with_the_base_as_it_is(chats: Path, tmp_path: Path) -> None:
    loaded = load_base(ModelSection(path=TINY))
    lora = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["o_proj"], task_type="CAUSAL_LM")
    get_peft_model(loaded.model, lora).save_pretrained(str(tmp_path))
    (tmp_path / "base.json").write_text(loaded.base.to_json())
    made = evaluate(tmp_path, str(chats), {"generate": False}, console=silent()).results
    alone = evaluate(TINY, str(chats), {"generate": False}, console=silent()).results
    assert made["base"]["loss"] == alone["base"]["loss"]
    assert made["tuned"]["loss"] == pytest.approx(alone["base"]["loss"], rel=1e-6)  # it was never trained


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("start", [*MOVED, "orthogonal", "mica"])
def test_a_quantised_base_takes_no_start_made_of_its_weights(
    start: str, quantization: str, chats: Path, tmp_path: Path
) -> None:
    config = config_of(chats, tmp_path / "run", {"init_lora_weights": start})
    config.model.quantization = quantization  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="computes with the base's own weights"):
        settle(config)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ".*(embed_tokens|qkv_proj)"}, "embed_tokens: an embedding"),
        (
            {"target_modules": ".*(embed_tokens|o_proj)", "init_lora_weights": "orthogonal"},
            "embed_tokens: an embedding",
        ),
        ({"r": 5, "init_lora_weights": "orthogonal"}, "the rank is 5, and it must be even"),
        ({"r": 33, "init_lora_weights": "mica"}, "the rank is 33"),
        ({"r": 64}, "the rank is 64, and its weight has a rank of 32 at most"),
        ({"r": 4, "rank_pattern": {"down_proj": 40}}, "down_proj: the rank is 40"),
    ],
    ids=["embedding", "embedding too", "odd rank", "mica", "rank", "rank of one layer"],
)
def test_a_layer_that_can_not_begin_so_is_refused(lora: dict[str, Any], said: str, chats: Path, tmp_path: Path) -> None:
    config = config_of(chats, tmp_path / "run", {"init_lora_weights": "pissa", **lora})
    with pytest.raises(ConfigError, match=said):
        prepare_run(settle(config))


def test_a_base_that_changed_meanwhile_is_not_measured(tmp_path: Path) -> None:
    loaded = load_base(ModelSection(path=TINY))
    lora = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, lora)
    loaded.base = replace(loaded.base, fingerprint="0" * 64)
    with pytest.raises(ModelError, match="has changed"), untouched_base(model, loaded, ModelSection(path=TINY)):
        pass
