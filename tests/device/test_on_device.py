"""The fast engine on this machine's CUDA device, or on its CPU where there is none: as plain transformers and PEFT.

    python -m pytest -m device

`benchmarks/device.py` runs these before it measures.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from engine.engine_helpers import LORA, assert_same, distance, make_pair, make_rows, one_by_one, packed, windowed
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.greedy_decode import decode
from phinetune.engine.lora_layers import use_fused_layers

pytestmark = pytest.mark.device
LENGTHS = (5, 33, 70, 2, 64, 66, 31, 130)
SHAPE = "random:{layers: 2, hidden_size: 64, intermediate_size: 128, heads: 4, kv_heads: 2, vocab: 320}"


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared beginning"])
def test_loss_and_gradients_in_float32(device: torch.device, share: bool) -> None:
    pair = make_pair(windowed())
    start = make_rows([20])[0]
    rows = make_rows(LENGTHS)
    if share:
        rows = [Encoded([*start.input_ids, *r.input_ids], [IGNORED] * 20 + r.labels) for r in rows]
    found, wanted = packed(pair.fast.to(device), rows, share=share), one_by_one(pair.plain.to(device), rows)
    assert_same(found, wanted, loss=1e-5, gradients=1e-4 if device.type == "cpu" else 1e-3)


def test_bfloat16_is_no_farther_from_float32_than_the_plain_path(device: torch.device) -> None:
    rows = make_rows(LENGTHS)
    exact = one_by_one(make_pair(windowed()).plain.to(device), rows)
    half = make_pair(windowed(), torch.bfloat16)
    found, plain = packed(half.fast.to(device), rows), one_by_one(half.plain.to(device), rows)
    assert abs(found.loss - exact.loss) <= 1.5 * abs(plain.loss - exact.loss) + 2e-3 * exact.loss
    off = {
        name: (distance(grad, exact.gradients[name]), distance(plain.gradients[name], exact.gradients[name]))
        for name, grad in found.gradients.items()
    }
    assert off
    assert {name: pair for name, pair in off.items() if not pair[0] <= 1.5 * pair[1] + 1e-2} == {}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loss_and_gradients_over_a_base_in_nf4(device: torch.device) -> None:
    pytest.importorskip("bitsandbytes")
    models = {}
    for fast in (False, True):
        torch.manual_seed(0)
        section = ModelSection(path=SHAPE, dtype="float32", quantization="nf4", device=device.type)
        base, lora = load_base(section, fast=fast).model, LoraConfig(**LORA)
        models[fast] = get_peft_model(base, use_fused_layers(lora, base) if fast else lora)
    with torch.no_grad():
        for ours, theirs in zip(*(m.parameters() for m in (models[True], models[False])), strict=True):
            if theirs.requires_grad:
                ours.copy_(theirs)
    rows = make_rows(LENGTHS)
    assert_same(packed(models[True], rows), one_by_one(models[False], rows), loss=1e-4, gradients=2e-3)


def test_greedy_answers_are_transformers_own(device: torch.device) -> None:
    pair = make_pair(windowed())
    prompts = [row.input_ids for row in make_rows((3, 40, 7, 29))]
    core: Any = pair.fast.to(device).get_base_model()
    found = decode(core, prompts, stops={5, 77}, limit=12)
    plain = pair.plain.to(device)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt], device=device)
        out = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[5, 77],
            pad_token_id=0,
        )
        assert out[0, len(prompt) :].tolist() == answer
