"""The seam for a second objective: a weighted loss a row, in this one file, trains, resumes, reports and is planned.

Nothing outside this file knows of it. It takes a number of each row (`weight`), needs the log-probability of each
conversation, averages over weights in place of labels, and has a metric of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from cli.cli_helpers import run as run_cli
from helpers import TINY, chat, write_jsonl
from phinetune import evaluate, plan, preview, train
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.config.run import make_config
from phinetune.config.section import Section
from phinetune.data.prepare import build_sets as build
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome
from phinetune.data.read.row import Row
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.errors import ConfigError, RunError
from phinetune.reporting.curves import charts
from phinetune.reporting.facts import read_run
from phinetune.training.objectives.objective import Objective, PackedRow, RowLoss, Sums
from phinetune.training.objectives.registry import OBJECTIVES
from phinetune.training.prepare import prepare_run, settle

# -- the objective ------------------------------------------------------------------------------------------


class WeightedRows(RowEncoder):
    """Chats with a number in the column `weight`, 1 where there is none."""

    columns = ("weight",)
    uses = ("weight",)

    def __call__(self, rows: Iterable[Row]) -> Iterator[RowOutcome]:
        for made in super().__call__(rows):
            if made.encoded:
                weight = float(made.row.fields.get("weight", 1.0))
                made.encoded = made.encoded._replace(values={"weight": weight})
            yield made


class WeightedOptions(Section):
    """The knobs of the weighted loss."""

    floor: float = Field(0.0, ge=0, description="the least weight that a row counts with")


class Weighted(Objective):
    """The weighted mean, over conversations, of the mean negative log-likelihood of a label."""

    kind = "weighted"
    Options = WeightedOptions
    rows = WeightedRows
    owned = True
    can_fill = False
    sums = ("nll", "weight", "heaviest")
    metrics = ("loss", "effective_rows")

    def weights(self, row: PackedRow) -> Tensor:
        weights: Tensor = row["weight"].clamp(min=self.options.floor)  # type: ignore[attr-defined]
        return weights

    def items(self, row: PackedRow) -> Tensor:
        return self.weights(row).sum()

    def loss(self, model: Any, row: PackedRow) -> RowLoss:
        out = model(**row)
        weights = self.weights(row)
        total = -(weights * out.log_probs / out.count).sum()
        return RowLoss(total, weights.sum(), {"heaviest": weights.max()})

    @torch.no_grad()
    def score(self, model: Any, batch: Mapping[str, Any]) -> Sums:
        made = self.loss(model, batch)
        squares = float((self.weights(batch) ** 2).sum())
        return {"nll": float(made.total), "weight": float(made.items), "heaviest": squares}

    def summarize(self, sums: Sums) -> dict[str, float]:
        return {"loss": sums["nll"] / sums["weight"], "effective_rows": sums["weight"] ** 2 / sums["heaviest"]}


# -- runs ---------------------------------------------------------------------------------------------------

SYSTEM = "You count what you are told to count, and you say no more than a number."


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "weighted", Weighted)


@pytest.fixture
def weighed(tmp_path: Path) -> Path:
    """Chats that begin alike, of unlike weight; two of them are the same but for it."""
    rows = [
        {
            **chat(f"{i // 2} and {i}? " + "Please. " * (i % 3), f"{2 * i} " * (1 + i % 3), system=SYSTEM),
            "weight": i + 0.5,
        }
        for i in range(11)
    ]
    return write_jsonl(tmp_path / "weighed.jsonl", [*rows, {**rows[3], "weight": 9.0}])


def sections(file: Path, folder: Path, **training: Any) -> dict[str, Any]:
    return {
        "model": TINY,
        "data": {"train": str(file), "eval": 0.25},
        "objective": {"kind": "weighted", "floor": 1.0},
        "peft_config": {"r": 4, "lora_alpha": 8},
        "training_config": {
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            **training,
        },
        "evaluation": {"max_new_tokens": 4, "max_prompts": 2},
    }


def entries(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if key in entry]


def by_transformers(examples: Iterable[Encoded], floor: float) -> float:
    """The loss over all examples by transformers' own model, one conversation at a time."""
    model: Any = load_base(ModelSection(path=TINY), fast=False).model
    losses, weights = [], []
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, labels[1:], ignore_index=IGNORED).item())
        weights.append(max(floor, (example.values or {})["weight"]))
    return sum(w * n for w, n in zip(weights, losses, strict=True)) / sum(weights)


@pytest.mark.parametrize(("micro", "accumulation"), [(9, 1), (3, 3), (2, 5)])
def test_the_first_loss_is_transformers_own(weighed: Path, tmp_path: Path, micro: int, accumulation: int) -> None:
    """However the step is cut: the loss is over the weights of all its micro-batches."""
    given = sections(
        weighed,
        tmp_path / "run",
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )
    prepared = prepare_run(settle(make_config(given)))
    wanted = by_transformers(prepared.chats.train.encoded, 1.0)
    train(**given, console=Console(quiet=True))
    assert entries(tmp_path / "run")[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_run_logs_evaluates_and_reports_its_own_numbers(weighed: Path, tmp_path: Path) -> None:
    shown = Console(file=io.StringIO(), width=120)
    folder = tmp_path / "run"
    given = sections(weighed, folder, eval_strategy="steps", eval_steps=2, metric_for_best_model="effective_rows")
    made = train(**given, console=shown)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    first, last = entries(folder)[0], entries(folder)[-1]
    assert last["loss"] < first["loss"]
    assert 1.0 <= first["heaviest"] <= 10.5
    evaluated = entries(folder, "eval_loss")
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert 1.0 <= evaluated[0]["eval_effective_rows"] <= 3.0
    assert "effective rows" in text
    assert made.results["training"]["best"]["metric"] == "effective_rows"
    titles = [chart["title"] for chart in charts([read_run(folder)])]
    assert "Held-out effective rows" in titles
    assert (folder / "report.html").is_file()
    assert evaluate(folder, console=Console(quiet=True)).results["tuned"]["loss"] > 0


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(weighed: Path, tmp_path: Path) -> None:
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for n, most in enumerate(steps):
            settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
            given = sections(weighed, tmp_path / name, max_steps=most, **settings)
            train(**given, resume=n > 0, changed=n > 0, console=Console(quiet=True))
    whole, parts = ([entry["loss"] for entry in entries(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_run_goes_on_with_its_own_objective_alone(weighed: Path, tmp_path: Path) -> None:
    given = sections(weighed, tmp_path / "run", save_strategy="steps", save_steps=2)
    train(**given, console=Console(quiet=True))
    with pytest.raises(RunError, match=r"objective\.kind: the run has weighted, the configuration now has sft"):
        train(**{**given, "objective": "sft"}, resume=True, console=Console(quiet=True))
    given["objective"] = {**given["objective"], "floor": 0.5}
    with pytest.raises(RunError, match=r"objective\.floor: the run has 1\.0, the configuration now has 0\.5"):
        train(**given, resume=True, console=Console(quiet=True))


def test_it_is_planned_by_its_own_loss(weighed: Path, tmp_path: Path) -> None:
    made = plan(**sections(weighed, tmp_path / "run"))
    assert made.fits
    assert made.steps.count == 4
    assert made.seconds is not None
    assert made.seconds > 0
    assert made.notes == []


def test_numbers_of_rows_survive_disk_and_stream(
    weighed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    given = sections(weighed, tmp_path / "run")
    given["data"]["eval"] = None
    small = prepare_run(settle(make_config(given))).chats.train
    monkeypatch.setattr(build, "SMALL", 3)
    large = prepare_run(settle(make_config(given))).chats.train
    given["data"]["streaming"] = True
    streamed = prepare_run(settle(make_config(given))).chats.train
    assert [row.values for row in large.encoded] == [row.values for row in small.encoded]
    assert large.encoded[:2] == list(small.encoded[:2])
    rows = [[row["weight"] for row in made.dataset()] for made in (small, large, streamed)]
    assert rows[0] == rows[1] == [i + 0.5 for i in range(11)] + [9.0]
    assert sorted(rows[2]) == sorted(rows[0])


def test_rows_are_checked_and_shown(
    weighed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"kind": "weighted"}
    (row,) = preview(str(weighed), 1, model=TINY, objective=objective)
    assert (row.form, row.problem) == ("messages", None)
    command = ("data", "check", weighed, "--set", f"model.path={TINY}", "--set", "objective.kind=weighted")
    assert run_cli(monkeypatch, *command) == 0
    out = capsys.readouterr().out
    assert "12 rows (12 as messages): 12 kept" in out
    assert "not used" not in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"engine": "plain"},
            "objective: weighted trains on the fast engine only, and engine: plain needs the plain one",
        ),
        ({"training_config": {"neftune_noise_alpha": 5.0}}, "training_config.neftune_noise_alpha needs the plain one"),
        ({"training_config": {"packing": True}}, "data.packing: weighted does not fill rows"),
        ({"objective": {"kind": "weighted", "flor": 1}}, "objective: there is no key `flor`; did you mean `floor`?"),
        ({"objective": {"kind": "weighted", "floor": -1}}, "objective: floor: Input should be greater than or equal"),
        ({"objective": "weigthed"}, "there is no objective `weigthed`; did you mean `weighted`?"),
        ({"objective": {"kind": "sft", "floor": 1}}, "objective: there is no key `floor`"),
    ],
    ids=["plain engine", "no fast form", "filled rows", "typo", "bad value", "unknown", "another's key"],
)
def test_what_it_can_not_do_is_refused_before_weights_are_loaded(
    weighed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("phinetune.training.run.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    given = sections(weighed, tmp_path / "run")
    for key, value in changes.items():
        given[key] = {**given[key], **value} if key == "training_config" else value
    with pytest.raises(ConfigError) as caught:
        train(**given, console=Console(quiet=True))
    assert words in str(caught.value)
