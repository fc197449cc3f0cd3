"""The fast engine on this machine's CUDA device, or on its CPU where there is none: as plain transformers and PEFT.

    python -m pytest -m device

`benchmarks/device.py` runs these before it measures.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from engine.engine_helpers import LORA, Step, assert_same, distance, make_pair, make_rows, trained_gradients, windowed
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.greedy_decode import decode
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.engine.packing import pack

pytestmark = pytest.mark.device
LENGTHS = (5, 33, 70, 2, 64, 66, 31, 130)
SHAPE = "random:{layers: 2, hidden_size: 64, intermediate_size: 128, heads: 4, kv_heads: 2, vocab: 320}"


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_step(model: Any, rows: list[Encoded]) -> Step:
    """transformers and PEFT, each row in a forward of its own."""
    model.zero_grad()
    device = next(model.parameters()).device
    count = sum(label != IGNORED for row in rows for label in row.labels[1:])
    loss, correct = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids], device=device), torch.tensor(row.labels[1:], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        part = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count
        part.backward()
        loss += part.item()
        correct += int((logits.argmax(-1) == labels).sum())
    return Step(loss, correct, count, trained_gradients(model))


def packed_step(model: Any, rows: list[Encoded], *, share: bool = False) -> Step:
    """The engine, all rows as one packed row, moved as the trainer moves it."""
    model.zero_grad()
    device = next(model.parameters()).device
    out = model(**{key: tensor.to(device) for key, tensor in pack(rows, share=share).items()})
    loss = out.nll / out.count
    loss.backward()
    return Step(loss.item(), round(out.correct.item()), round(out.count.item()), trained_gradients(model))


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared beginning"])
def test_loss_and_gradients_in_float32(device: torch.device, share: bool) -> None:
    pair = make_pair(windowed())
    start = make_rows([20])[0]
    rows = make_rows(LENGTHS)
    if share:
        rows = [Encoded([*start.input_ids, *r.input_ids], [IGNORED] * 20 + r.labels) for r in rows]
    found, wanted = packed_step(pair.fast.to(device), rows, share=share), plain_step(pair.plain.to(device), rows)
    assert_same(found, wanted, loss=1e-5, gradients=1e-4 if device.type == "cpu" else 1e-3)


def test_bfloat16_is_no_farther_from_float32_than_the_plain_path(device: torch.device) -> None:
    rows = make_rows(LENGTHS)
    exact = plain_step(make_pair(windowed()).plain.to(device), rows)
    half = make_pair(windowed(), torch.bfloat16)
    found, plain = packed_step(half.fast.to(device), rows), plain_step(half.plain.to(device), rows)
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
    assert_same(packed_step(models[True], rows), plain_step(models[False], rows), loss=1e-4, gradients=2e-3)


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
