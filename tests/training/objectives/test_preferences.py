"""Runs that learn from preferences: however a step is cut, resumed, in two settings; and what they refuse."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers import TINY, train_only, write_jsonl
from phinetune import plan
from phinetune.api.held_out import row_encoder
from phinetune.config.run import make_config
from phinetune.data.prepare import build_sets
from phinetune.errors import ConfigError
from phinetune.planning.probe import Speed
from phinetune.screen.plan import show_plan
from phinetune.training import auto_settings
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.run import open_place, train_run

PROMPT = "Count with me, as slowly and as carefully as you can, and never leave a number out. "
PAIRS = [
    {
        "prompt": f"{PROMPT}How many are {i % 5} and {i}?",
        "chosen": "They are " + " ".join(map(str, range(i % 4 + 1))),
        "rejected": f"No{'!' * (i % 3)} {i}",
    }
    for i in range(12)
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]
KINDS = ["dpo", "orpo", "simpo", "kto"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))


def sections(folder: Path, kind: str = "dpo", knobs: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    file = write_jsonl(folder.parent / f"{kind}.jsonl", JUDGED if kind == "kto" else PAIRS)
    return {
        "model": {"path": TINY, "dtype": "float32"},
        "data": {"train": str(file), "eval": 0.25},
        "objective": {"kind": kind, **(knobs or {})},
        "peft_config": {"r": 4, "lora_alpha": 8},
        "training_config": {
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
            **training,
        },
        "evaluation": {"enabled": False},
    }


def run(given: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    train_only(make_config(given), **options)
    return logged(Path(given["training_config"]["output_dir"]))


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(kind: str, tmp_path: Path) -> None:
    """Also where the reference is gone from the cache: it is computed again, by the model as the run started."""
    whole = [entry["loss"] for entry in run(sections(tmp_path / "whole", kind)) if "loss" in entry]
    halves = sections(tmp_path / "parts", kind, save_strategy="steps", save_steps=2)
    run({**halves, "training_config": {**halves["training_config"], "max_steps": 2}})
    for entry in (tmp_path / "home" / "data").glob("*/reference.arrow"):
        entry.unlink()
    run(halves, resume=True, changed=True)
    assert [entry["loss"] for entry in logged(tmp_path / "parts") if "loss" in entry] == whole
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [("dpo", {"loss_type": ["sigmoid", "sft"]}), ("orpo", {}), ("simpo", {})],
    ids=["dpo", "orpo", "simpo"],
)
def test_however_a_step_is_cut_its_loss_is_the_same(kind: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    """Also the part that is averaged over labels, of which each micro-batch has another number."""
    found = []
    for micro, accumulation in ((8, 1), (1, 8)):
        steps = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        given = sections(tmp_path / f"{micro}", kind, knobs, **steps, train_sampling_strategy="sequential")
        given["data"] |= {"limit": 8, "eval": None}
        found.append([entry["loss"] for entry in run(given) if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_the_preference_and_says_so(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = sections(
        tmp_path / "run",
        kind,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="rewards/margins",
    )
    with caplog.at_level(logging.INFO, "phinetune"):
        entries = run(given)
    first, last = (next(e for e in order if "rewards/margins" in e) for order in (entries, entries[::-1]))
    assert last["rewards/margins"] > first["rewards/margins"]
    evaluated = [entry for entry in entries if "eval_loss" in entry]
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert {f"eval_{name}" for name in names} <= evaluated[-1].keys()
    assert evaluated[-1]["eval_rewards/margins"] > 0
    told = "the reference's log-probabilities of" in caplog.text
    assert told is (kind in ("dpo", "kto"))


def test_the_reference_is_found_again_by_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same rows and weights, whatever else is changed; not of other weights."""
    first = run(sections(tmp_path / "first"))
    with caplog.at_level(logging.INFO, "phinetune"):
        again = run(sections(tmp_path / "again", learning_rate=1e-3))
    assert caplog.text.count("computed before") == 2
    assert [again[0][name] for name in ("loss", "logps/chosen")] == [
        first[0][name] for name in ("loss", "logps/chosen")
    ]
    caplog.clear()
    other = sections(tmp_path / "other")
    other["model"]["seed"] = 1
    with caplog.at_level(logging.INFO, "phinetune"):
        run(other)
    assert "computed before" not in caplog.text


def test_the_keys_of_dpoconfig_paste_in(tmp_path: Path) -> None:
    """As TRL's documentation and older scripts have them."""
    given = sections(
        tmp_path / "run",
        beta=0.3,
        loss_type="sigmoid",
        rpo_alpha=0.5,
        max_prompt_length=512,
        max_length=768,
        precompute_ref_log_probs=True,
        truncation_mode="keep_end",
        generate_during_eval=False,
        sync_ref_model=False,
    )
    given["peft_config"]["lora_dropout"] = 0.05
    settled = settle(make_config(given))
    assert settled.objective.options.model_dump() == {
        **{"beta": 0.3, "disable_dropout": True, "label_smoothing": 0.0, "discopop_tau": 0.05},
        **{"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    }
    assert settled.settings.peft["lora_dropout"] == 0
    assert type(row_encoder(make_config(given))).__name__ == "PairRows"  # so `data check` and `evaluate` take them too
    notes = "\n".join(settled.settings.notes)
    for words in (
        "`beta` is taken as",
        "`rpo_alpha` is retired",
        "`max_prompt_length` has no effect",
        "lora_dropout: 0.05",
    ):
        assert words in notes


@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_disk_are_those_in_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a number of rows, several processes write them to disk. A pair is two examples for kto."""
    given = sections(tmp_path / "run", kind)
    given["data"] |= {"eval": None, "train": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))}
    small = prepare_run(settle(make_config(given))).chats.train
    monkeypatch.setattr(build_sets, "SMALL", 3)
    large = prepare_run(settle(make_config(given))).chats.train
    assert len(large) == len(small) == len(PAIRS) * (2 if kind == "kto" else 1)
    assert list(large.encoded) == list(small.encoded)
    assert large.report.lines() == small.report.lines()
    if kind == "kto":
        assert "pairs taken answer by answer: 12, now 24 examples" in "\n".join(large.report.lines())
    rows = [large.dataset()[0], small.dataset()[0]]
    assert rows[0]["seq_lengths"] == rows[1]["seq_lengths"]


@pytest.mark.parametrize("kind", ["orpo", "simpo"])
def test_a_stream_of_pairs_is_learnt_as_a_file_is(kind: str, tmp_path: Path) -> None:
    """A step takes all rows, since a stream has another order. dpo and kto are refused below: they need a reference."""
    found = []
    for streaming in (False, True):
        given = sections(tmp_path / f"{streaming}", kind, per_device_train_batch_size=len(PAIRS), max_steps=3)
        given["data"] |= {"eval": None, "streaming": streaming}
        found.append([entry["loss"] for entry in run(given) if "loss" in entry])
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_rate_is_a_share_of_imitations_unless_one_is_given(tmp_path: Path) -> None:
    given = sections(tmp_path / "run")
    del given["training_config"]["learning_rate"]
    chosen = prepare_run(settle(make_config(given))).settings.training["learning_rate"]
    assert chosen == auto_settings.two_digits(0.03 * auto_settings.learning_rate(hidden=32, steps=4))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("dpo", {"objective": {"beta": 0.2}, "training_config": {"beta": 0.3}}, "and objective.beta is 0.2"),
        ("dpo", {"training_config": {"sync_ref_model": True}}, "training_config.sync_ref_model: `True` is not there"),
        ("dpo", {"training_config": {"f_divergence_type": "js_divergence"}}, "`js_divergence` is not there"),
        ("dpo", {"objective": {"loss_type": "sigmiod"}}, "there is no loss_type `sigmiod` (there are sigmoid, "),
        ("dpo", {"objective": {"loss_weights": [1, 2]}}, "loss_weights has 2 numbers for 1 entries of loss_type"),
        ("dpo", {"objective": {"simpo_gamma": 1}}, "objective: there is no key `simpo_gamma`"),
        ("dpo", {"data": {"streaming": True, "eval": None}}, "data.streaming: dpo computes the reference"),
        ("kto", {"data": {"streaming": True, "eval": None}}, "data.streaming: kto computes the reference"),
        ("dpo", {"data": {"loss_on": "all"}}, "data.loss_on: all: a preference is learnt from the answers alone"),
        ("dpo", {"data": {"format": "messages"}}, "data.format: rows of the form messages are for another objective"),
        ("kto", {"training_config": {"per_device_train_batch_size": 1}}, "per_device_train_batch_size: kto estimates"),
        ("kto", {"training_config": {"train_sampling_strategy": "random"}}, "random: kto needs `sequential`"),
        ("kto", {"training_config": {"train_sampling_strategy": "group_by_length"}}, "kto needs `sequential`"),
        ("kto", {"training_config": {"group_by_length": True}}, "group_by_length"),
        (
            "kto",
            {"training_config": {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 64}},
            "per_device_train_batch_size: kto estimates",
        ),
        ("sft", {"data": {"format": "pair"}}, "data.format: rows of the form pair are for another objective"),
        ("sft", {}, "`chosen` and `rejected` are for objectives that learn from preferences: set objective to dpo"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(kind: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = sections(tmp_path / "run", kind)
    for section, values in changes.items():
        given[section] = {**given[section], **values}
    with pytest.raises(ConfigError if kind != "sft" or changes else Exception) as caught:
        prepare_run(settle(make_config(given)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "knobs", "rows"), [("kto", {}, 4), ("kto", {"loss_type": "apo_zero_unpaired"}, 2), ("dpo", {}, 2)]
)
def test_a_batch_that_is_left_open_has_the_rows_that_the_loss_needs(
    kind: str, knobs: dict[str, Any], rows: int, tmp_path: Path
) -> None:
    """In micro-batches of two, the answers of a pair would have no neighbours but each other."""
    made = prepare_run(settle(make_config(sections(tmp_path / "run", kind, knobs, per_device_train_batch_size="auto"))))
    assert made.args.per_device_train_batch_size == rows
    (why,) = [one.why for one in made.choices if one.key.endswith("per_device_train_batch_size")]
    assert ("this objective needs 4 in a micro-batch" in why) is (rows == 4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_planned_by_its_own_loss(kind: str, tmp_path: Path) -> None:
    made = plan(**sections(tmp_path / "run", kind))
    assert made.fits
    assert made.steps.count == 4
    assert made.seconds
    assert made.reference_seconds is not None
    assert made.seconds > made.reference_seconds
    assert (made.reference_seconds > 0) is (kind in ("dpo", "kto"))
    shown = Console(file=io.StringIO(), width=140)
    show_plan(made, shown)
    assert ("\nreference: about 0:00:0" in shown.file.getvalue()) is (kind in ("dpo", "kto"))  # type: ignore[attr-defined]


def test_a_plan_counts_all_rows_of_the_reference_once() -> None:
    speed = Speed(100, {}, 0.0, 0.0, forward=(0.5, 0.25))
    assert speed.reading(layers=4, tokens=1000) == 10 * (4 * 0.5 + 0.25)


def test_knobs_of_preferences_beside_sft_are_told_whose_they_are(tmp_path: Path) -> None:
    given = sections(tmp_path / "run", beta=0.1, loss_weights=[1.0]) | {"objective": "sft"}
    with pytest.raises(ConfigError) as caught:
        settle(make_config(given))
    assert caught.value.problems == [
        "training_config: `beta` is for `objective: dpo, orpo, simpo, kto`, and this run's objective is sft",
        "training_config: `loss_weights` is for `objective: dpo`, and this run's objective is sft",
    ]


def test_apo_takes_rows_in_any_order_and_one_by_one(tmp_path: Path) -> None:
    """It estimates nothing from neighbours."""
    knobs, steps = {"loss_type": "apo_zero_unpaired"}, {"per_device_train_batch_size": 1}
    given = sections(tmp_path / "run", "kto", knobs, train_sampling_strategy="random", **steps)
    assert prepare_run(settle(make_config(given))).args.train_sampling_strategy == "random"


@pytest.mark.parametrize(
    ("knobs", "training", "losses", "weights"),
    [
        ({}, {}, ["sigmoid", "sft"], [1.0, 0.5]),
        ({"loss_type": "hinge"}, {}, ["hinge", "sft"], [1.0, 0.5]),
        ({"loss_type": ["hinge", "ipo"], "loss_weights": [2.0, 1.0]}, {}, ["hinge", "ipo", "sft"], [2.0, 1.0, 0.5]),
        ({"loss_type": "hinge"}, {"loss_type": "hinge"}, ["hinge", "sft"], [1.0, 0.5]),
        ({"loss_weights": [2.0]}, {"loss_type": "ipo"}, ["ipo", "sft"], [2.0, 0.5]),
    ],
)
def test_rpo_alpha_stands_beside_the_losses_of_either_section(
    knobs: dict[str, Any], training: dict[str, Any], losses: list[str], weights: list[float], tmp_path: Path
) -> None:
    options = settle(make_config(sections(tmp_path / "run", "dpo", knobs, rpo_alpha=0.5, **training))).objective.options
    assert (options.loss_type, options.loss_weights) == (losses, weights)  # type: ignore[attr-defined]


def test_rpo_alpha_beside_two_losses_is_refused(tmp_path: Path) -> None:
    given = sections(tmp_path / "run", "dpo", {"loss_type": "hinge"}, rpo_alpha=0.5, loss_type="ipo")
    with pytest.raises(ConfigError, match=r"objective\.loss_type is 'hinge'; keep one of them"):
        settle(make_config(given))


def test_exo_pair_without_smoothing_is_refused_as_trl_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exo_pair needs a label_smoothing above 0, as in TRL"):
        settle(make_config(sections(tmp_path / "run", "dpo", {"loss_type": "exo_pair"})))
    assert settle(make_config(sections(tmp_path / "run", "dpo", {"loss_type": "exo_pair", "label_smoothing": 1e-3})))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no such signal")
def test_a_signal_during_the_reference_stops_the_run_behind_its_first_step(tmp_path: Path) -> None:
    """By default it would end the process; here it would go to a handler that does nothing."""
    config = make_config(sections(tmp_path / "run", save_strategy="steps"))
    place = open_place(config)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        made = train_run(
            prepare_run(settle(config)), place, on_reference=lambda *_: os.kill(os.getpid(), signal.SIGUSR1)
        )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert made.stopped
    assert [entry["step"] for entry in logged(tmp_path / "run") if "loss" in entry] == [1]
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
