"""A run is prepared in one way: what stops a run stops its plan, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers import chat, tiny_config, train_only, write_jsonl
from phinetune.api.plan import plan_config
from phinetune.api.train import train_config
from phinetune.checkpoints.load import Loaded
from phinetune.config.run import RunConfig, make_config
from phinetune.errors import ConfigError, PhinetuneError
from phinetune.training.prepare import prepare_run, settle


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("training.run", "planning.probe"):
        monkeypatch.setattr(f"phinetune.{place}.load_base", lambda *_, **__: pytest.fail("weights were loaded"))


def train(config: RunConfig) -> Any:
    return train_config(config, Console(quiet=True))


STOPS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "unknown metric": ({"training_config": {"metric_for_best_model": "bleuu"}}, "no evaluation counts `bleuu`"),
    "early stopping": (
        {"data": {"eval": None}, "evaluation": {"early_stopping_patience": 2}},
        "there is no evaluation to go by",
    ),
    "endless stream": (
        {"data": {"streaming": True, "eval": None}, "training_config": {"max_steps": -1}},
        "a stream has no known end",
    ),
    "missing file": ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
    "missing function": (
        {"evaluation": {"metrics": [{"name": "mine", "function": "nowhere_at_all:f"}]}},
        "nowhere_at_all",
    ),
    "learning rate": ({"training_config": {"learning_rate": -1}}, "learning_rate: it should be 0 or more"),
    "optimizer": ({"training_config": {"optim": "lomo"}}, "You need to install `lomo_optim`"),
    "module": ({"peft_config": {"exclude_modules": ["o_prj"]}}, "`o_prj` matches no linear layer"),
    "nothing held out": (
        {"data": {"eval": None}, "training_config": {"eval_strategy": "epoch"}},
        "there are no held-out chats to score",
    ),
    "unknown key": ({"training_config": {"learning_rat": 1}}, "there is no key `learning_rat`"),
    "nothing ends a turn": ({"training_config": {"max_length": 3}}, "no chat to use"),
}


@pytest.mark.parametrize("way", [train, plan_config], ids=["train", "plan"])
@pytest.mark.parametrize(("changes", "words"), STOPS.values(), ids=STOPS)
def test_what_stops_a_run_stops_its_plan(
    chats: Path,
    tmp_path: Path,
    no_weights: None,
    way: Callable[[RunConfig], Any],
    changes: dict[str, dict[str, Any]],
    words: str,
) -> None:
    tree = tiny_config(chats, tmp_path / "run").model_dump()
    for section, values in changes.items():
        tree[section] |= values
    with pytest.raises(PhinetuneError) as caught:
        way(make_config(tree))
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_bad_row_is_told_before_weights_are_loaded(tmp_path: Path, no_weights: None) -> None:
    file = write_jsonl(tmp_path / "bad.jsonl", [chat("a", "b"), {"nothing": 1}, *[chat("c", "d")] * 8])
    with pytest.raises(PhinetuneError, match=r"bad.jsonl:2: the keys \(nothing\)"):
        train(tiny_config(file, tmp_path / "run"))


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.training.prepare.build_chats", lambda _: pytest.fail("data was read"))


@pytest.mark.parametrize("way", [train, plan_config], ids=["train", "plan"])
def test_what_the_checkpoint_lacks_is_told_before_data_is_read(
    chats: Path, tmp_path: Path, tiny: Loaded, no_data: None, way: Callable[[RunConfig], Any]
) -> None:
    """A million rows take long to prepare."""
    folder = tmp_path / "base"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    config = tiny_config(chats, tmp_path / "run")
    config.model.path = str(folder)
    with pytest.raises(PhinetuneError, match="no weights there"):
        way(config)


@pytest.mark.parametrize("way", [train, plan_config], ids=["train", "plan"])
def test_a_missing_bitsandbytes_is_told_before_data_is_read(
    chats: Path, tmp_path: Path, no_data: None, monkeypatch: pytest.MonkeyPatch, way: Callable[[RunConfig], Any]
) -> None:
    monkeypatch.setattr("phinetune.checkpoints.quantize.find_spec", lambda name: None)
    config = tiny_config(chats, tmp_path / "run")
    config.model.quantization = "nf4"
    with pytest.raises(PhinetuneError, match=r"pip install 'phinetune\[quant\]'"):
        way(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
        {"packing": True, "max_length": 200},
    ],
    ids=["max_steps", "epochs", "filled rows"],
)
def test_a_prepared_run_knows_the_steps_that_the_trainer_takes(
    chats: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = tiny_config(chats, tmp_path / "run", **changes)
    prepared = prepare_run(settle(config))
    summary = train_only(config).summary
    assert (prepared.steps.count, prepared.steps.tokens) == (summary["steps"], summary["tokens"])


def test_a_prepared_run_says_why_it_is_plain(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run", neftune_noise_alpha=5.0)
    engine = prepare_run(settle(config)).engine
    assert engine.fast is None
    assert engine.reason == "training_config.neftune_noise_alpha"


@pytest.mark.parametrize(
    ("engine", "packing", "words"),
    [
        ("plain", None, "data.packing: `tokens` has no effect: the plain engine takes chats one by one"),
        ("fast", False, "training_config: `packing: false` has no effect: data.packing is `tokens`"),
        ("fast", None, None),
    ],
)
def test_packing_that_does_not_happen_or_is_asked_for_twice_is_named(
    chats: Path, tmp_path: Path, engine: str, packing: bool | None, words: str | None
) -> None:
    tree = tiny_config(chats, tmp_path / "run").model_dump()
    tree |= {"engine": engine, "data": {**tree["data"], "packing": "tokens"}}
    tree["training_config"] |= {} if packing is None else {"packing": packing}
    told = [note for note in prepare_run(settle(make_config(tree))).settings.notes if "packing" in note]
    assert [note[: len(words or "")] for note in told] == ([words] if words else [])


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_is_asked_for_on_the_plain_engine_alone(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.training_config["use_liger_kernel"] = True
    made = prepare_run(settle(config))
    assert made.engine.fast
    assert not made.args.use_liger_kernel
    assert [note for note in made.settings.notes if "`use_liger_kernel` is for the plain engine" in note]
    config.engine.kind = "plain"
    with pytest.raises(ConfigError, match=r"use_liger_kernel: liger-kernel is not installed"):
        prepare_run(settle(config))
