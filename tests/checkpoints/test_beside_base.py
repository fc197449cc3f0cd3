"""An adapter read without its base: the updates that PEFT would compute, or a sentence on why it can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import TINY
from phinetune.checkpoints.adapters import attach_adapter, usable_adapter
from phinetune.checkpoints.beside_base import read_beside
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.engine.continuous.low_rank import read_updates
from phinetune.errors import ModelError

SECTION = ModelSection(path=TINY, dtype="float32", device="cpu")
PATTERNS: dict[str, Any] = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 64}, "use_rslora": True}
SOME = {"target_modules": ["qkv_proj"], "layers_to_transform": [1]}


def saved(folder: Path, **lora: Any) -> Path:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    model = get_peft_model(load_base(SECTION).model, LoraConfig(task_type="CAUSAL_LM", **settings))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("lora", [{}, PATTERNS, SOME], ids=["plain", "patterns", "some layers"])
def test_the_updates_are_pefts(tmp_path: Path, lora: dict[str, Any]) -> None:
    folder, loaded = saved(tmp_path, **lora), load_base(SECTION)
    before = {name: type(module) for name, module in loaded.model.named_modules()}
    found = read_beside(loaded, SECTION, folder)
    assert {name: type(module) for name, module in loaded.model.named_modules()} == before  # the base stays as it was
    wanted = read_updates(attach_adapter(loaded, folder, usable_adapter(folder, SECTION)))
    assert found.keys() == wanted.keys()
    assert len(found) == (1 if lora is SOME else 8)
    for where, update in wanted.items():
        assert torch.equal(found[where].a, update.a)
        assert torch.equal(found[where].b_t, update.b_t)
        assert found[where].scaling == update.scaling


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["qkv_proj", "lm_head"]}],
    ids=["dora", "saved module", "head"],
)
def test_what_is_more_than_that_is_refused(tmp_path: Path, lora: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="phinetune merge"):
        read_beside(load_base(SECTION), SECTION, saved(tmp_path, **lora))
