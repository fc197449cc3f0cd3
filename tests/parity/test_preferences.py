"""Losses, gradients and reference log-probabilities of preferences are those of TRL's trainers, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from helpers import DEVICE, TINY
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.load import load_base
from phinetune.config.data import DataSection
from phinetune.config.model import ModelSection
from phinetune.config.objective import ObjectiveSection
from phinetune.data.prepare.encode_answers import parts_of
from phinetune.data.read.row import Row
from phinetune.engine.examples import Encoded
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.engine.packing import PackedCollator
from phinetune.training.objectives.dpo import LOSSES
from phinetune.training.objectives.objective import Objective
from phinetune.training.objectives.preferences import SPREAD
from phinetune.training.objectives.registry import make_objective
from phinetune.training.reference import with_reference

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ARGS = {"report_to": [], "use_cpu": DEVICE == "cpu", "bf16": False, "gradient_checkpointing": False}
ARGS["disable_tqdm"] = True
NEAR = 1e-4 if DEVICE == "cpu" else 1e-3  # of gradients, as in tests/device
WORDS = "Count with me, as slowly and as carefully as you can, and never leave a number out. "


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


# Prompts of unlike length, two of them alike, one in two exchanges; answers of unlike length.
PAIRS = [
    {
        "prompt": [turn("user", f"{WORDS * (1 + i % 2)}How many are {min(i, 3)} and {i % 2}?"), *more],
        "chosen": [turn("assistant", "They are " + " ".join(map(str, range(i + 1))))],
        "rejected": [turn("assistant", f"No{'!' * (5 - i)} {i}")],
    }
    for i, more in enumerate([[], [], [turn("assistant", "Do you mean it?"), turn("user", "I do.")], [], []])
]


def encoded(objective: Objective, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[Encoded]:
    encode = objective.row_encoder(DataSection(), make_encoder(tokenizer), 1024)
    made = list(encode(Row(f"rows:{i}", row) for i, row in enumerate(rows)))
    assert not [one.reason for one in made if one.reason]
    return [one.encoded for one in made if one.encoded]


def ours(kind: str, *, share: bool = True, rows: Sequence[dict[str, Any]] = PAIRS, **knobs: Any) -> Any:
    """The loss, the adapter's gradients and the metrics of one packed row, with an adapter that has moved."""
    objective = make_objective(ObjectiveSection(kind=kind, **knobs))
    loaded = load_base(ModelSection(path=TINY))
    torch.manual_seed(0)
    model: Any = adapted(loaded.model)
    examples = encoded(objective, rows, loaded.tokenizer)
    data: Any = objective.arranged([one.to_row() for one in examples], len(examples), 1024)
    collate = PackedCollator(share=share, rope_limit=None, owned=True, columns=objective.columns)
    if objective.reference:
        decides = {"kind": kind, "share": share, "rows": repr([data[i] for i in range(len(data))])}
        data = with_reference(model, data, objective.reference, collate, decides, loaded.tokenizer)
    move(model)
    row = {name: part.to(DEVICE) for name, part in collate([data[i] for i in range(len(data))]).items()}
    made = objective.loss(model.train(), row)
    loss = (made.total / made.items).sum()
    loss.backward()
    references = {name: row[name] for name in objective.reference}
    return float(loss.detach()), gradients(model), made.metrics, references, examples


def adapted(model: Any) -> Any:
    lora = LoraConfig(**LORA)
    return get_peft_model(model, use_fused_layers(lora, model))


def move(model: Any) -> None:
    """Give the adapter the same weights in any model, so that it differs from its reference."""
    state = get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(1)
    moved = {name: torch.randn(state[name].shape, generator=generator) * 0.3 for name in sorted(state)}
    set_peft_model_state_dict(model, moved)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n.replace("module.", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))


def plain() -> tuple[Any, Any]:
    loaded = load_base(ModelSection(path=TINY), fast=False)
    loaded.tokenizer.pad_token = loaded.tokenizer.pad_token or loaded.tokenizer.eos_token
    return loaded.model, loaded.tokenizer


def assert_same(mine: Any, loss: Tensor, model: Any) -> None:
    assert mine[0] == pytest.approx(float(loss.detach()), abs=1e-5, rel=1e-5)
    theirs = gradients(model)
    assert mine[1].keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(
            mine[1][name], grad, atol=1e-4, rtol=NEAR, msg=lambda text, name=name: f"{name}: {text}"
        )


def batch_of(trainer: Any) -> Any:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    model, tokenizer = plain()
    args = DPOConfig(
        str(tmp_path_factory.mktemp("dpo")),
        per_device_train_batch_size=len(PAIRS),
        train_sampling_strategy="sequential",
        **ARGS,
    )
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    move(trainer.model)
    return trainer


CASES = [
    *({"loss_type": [name], "label_smoothing": 0.1 if name in ("robust", "exo_pair") else 0.0} for name in LOSSES),
    {"loss_type": ["sigmoid", "hinge", "sft"], "loss_weights": [0.8, 0.2, 1.5], "beta": 0.4},
]


@pytest.mark.parametrize("knobs", CASES, ids=["-".join(case["loss_type"]) for case in CASES])
def test_dpo_is_that_of_trl(dpo: DPOTrainer, knobs: dict[str, Any]) -> None:
    dpo.loss_types, dpo.loss_weights = knobs["loss_type"], knobs.get("loss_weights", [1.0])
    dpo.beta, dpo.label_smoothing = knobs.get("beta", 0.1), knobs.get("label_smoothing", 0.0)
    dpo.model.zero_grad()
    loss = dpo.compute_loss(dpo.model.train(), batch_of(dpo))
    loss.backward()
    assert_same(ours("dpo", **knobs), loss, dpo.model)


def test_dpos_reference_and_metrics_are_those_of_trl(dpo: DPOTrainer) -> None:
    dpo.loss_types, dpo.loss_weights, dpo.beta = ["sigmoid"], [1.0], 0.1
    batch = batch_of(dpo)
    chosen, rejected = dpo.compute_ref_log_probs(dpo.model, batch)
    dpo._metrics["train"].clear()
    dpo.compute_loss(dpo.model.train(), batch)
    _, _, metrics, references, _ = ours("dpo")
    for name, wanted in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
        torch.testing.assert_close(references[name], torch.as_tensor(wanted, device=DEVICE), atol=1e-5, rtol=1e-5)
    theirs = {name: values[-1] for name, values in dpo._metrics["train"].items()}
    assert {name.replace("mean_", "") for name in theirs} - {"num_tokens"} == metrics.keys()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(theirs[name.replace("token_acc", "mean_token_acc")], abs=1e-4), name


@pytest.mark.parametrize("kind", ["orpo", "simpo"])
def test_how_logits_are_spread_is_counted_as_dpo_counts_it(kind: str) -> None:
    """TRL's trainers for orpo and simpo take the mean of prompts and padding too."""
    dpos, others = ours("dpo")[2], ours(kind)[2]
    for name in SPREAD:
        assert float(others[name]) == pytest.approx(float(dpos[name]), abs=1e-5), name


@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo", "kto"])
def test_shared_prompts_change_nothing(kind: str) -> None:
    with_them, without = ours(kind), ours(kind, share=False)
    assert with_them[0] == pytest.approx(without[0], rel=1e-6)
    for name, grad in without[1].items():
        torch.testing.assert_close(with_them[1][name], grad, atol=1e-5, rtol=1e-4)


def odd_batch(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """The examples' ids as the experimental trainers of TRL take them."""
    batch = {}
    for i, side in enumerate(("chosen", "rejected")):
        rows = [parts_of(one)[i] for one in examples]
        width = max(len(row.input_ids) for row in rows)
        fill = [width - len(row.input_ids) for row in rows]
        starts = [prompt_of(one) for one in examples]
        batch[f"{side}_input_ids"] = torch.tensor([r.input_ids + [0] * n for r, n in zip(rows, fill, strict=True)])
        batch[f"{side}_attention_mask"] = torch.tensor(
            [[1] * len(r.input_ids) + [0] * n for r, n in zip(rows, fill, strict=True)]
        )
        batch[f"{side}_labels"] = torch.tensor(
            [[-100] * start + r.input_ids[start:] + [-100] * n for r, n, start in zip(rows, fill, starts, strict=True)]
        )
    return {name: ids.to(DEVICE) for name, ids in batch.items()}


def prompt_of(example: Encoded) -> int:
    """Tokens before the answers: those without a label in the rejected conversation."""
    return next(i for i, label in enumerate(parts_of(example)[1].labels) if label >= 0)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_orpo_is_that_of_trl(tmp_path: Path, beta: float) -> None:
    mine = ours("orpo", beta=beta)
    model, tokenizer = plain()
    args = ORPOConfig(str(tmp_path), beta=beta, max_length=1024, remove_unused_columns=False, **ARGS)
    trainer = ORPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    move(trainer.model)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.train(), odd_batch(mine[4]))
    loss.backward()
    assert_same(mine, loss, trainer.model)
    for name, value in mine[2].items():
        if name not in ("token_accuracy", *SPREAD):
            assert float(value) == pytest.approx(metrics[name], abs=1e-4), name


@pytest.mark.parametrize(
    "knobs",
    [
        {"loss_type": "simpo"},
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.1},
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "alphapo", "alpha": 0.25},
    ],
    ids=["simpo", "published", "cpo", "hinge", "ipo", "alphapo"],
)
def test_simpo_is_trls_cpo(tmp_path: Path, knobs: dict[str, Any]) -> None:
    mine = ours("simpo", **knobs)
    model, tokenizer = plain()
    args = CPOConfig(str(tmp_path), max_length=1024, remove_unused_columns=False, **knobs, **ARGS)
    trainer = CPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    move(trainer.model)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.train(), odd_batch(mine[4]))
    loss.backward()
    assert_same(mine, loss, trainer.model)
    for name, value in mine[2].items():
        if name in metrics and name not in SPREAD and (name != "nll_loss" or args.cpo_alpha):
            assert float(value) == pytest.approx(metrics[name], abs=1e-4), name


JUDGED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, pair in enumerate(PAIRS)
]


@pytest.mark.parametrize(
    "knobs",
    [{}, {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7}, {"loss_type": "apo_zero_unpaired"}],
    ids=["kto", "weights", "apo"],
)
@pytest.mark.parametrize("rows", [JUDGED, PAIRS], ids=["judged", "pairs"])
def test_kto_is_that_of_trl(tmp_path: Path, rows: list[dict[str, Any]], knobs: dict[str, Any]) -> None:
    """Of pairs too, where TRL puts all chosen answers before the rejected ones."""
    mine = ours("kto", rows=rows, **knobs)
    model, tokenizer = plain()
    args = KTOConfig(str(tmp_path), per_device_train_batch_size=len(mine[4]), **knobs, **ARGS)
    trainer = KTOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    move(trainer.model)
    loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer))
    loss.backward()
    assert_same(mine, loss, trainer.model)
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert theirs.keys() - {"num_tokens"} == mine[2].keys()
    for name, value in mine[2].items():
        assert float(value) == pytest.approx(theirs[name], abs=1e-4), name
    assert float(mine[2]["kl"]) > 0 or "loss_type" in knobs
