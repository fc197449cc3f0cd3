"""A race: its winner is the run with that rate given by hand; whatever stops it, it goes on."""

from __future__ import annotations

import io
import json
import math
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers import tiny_config, train_only
from phinetune.api import race as api_race
from phinetune.api import train as api_train
from phinetune.api.train import train_config
from phinetune.api.tune import tune_config
from phinetune.config.run import RunConfig, make_config
from phinetune.errors import ConfigError, RunError
from phinetune.files import remove
from phinetune.liveness import this_process
from phinetune.planning.plan import make_plan
from phinetune.training import halving, prepare, stretches
from phinetune.training import race as module
from phinetune.training import study as study_module
from phinetune.training.race_field import LEAD, Entry, Stage, Wish
from phinetune.training.study import BEAT, OWNER, Candidate, Study


class Killed(BaseException):
    """As if the process were gone: nothing catches it."""


def raise_killed(*args: Any, **kwargs: Any) -> None:
    raise Killed


def config_of(chats: Path, folder: Path, **training: Any) -> RunConfig:
    """Twelve steps with dropout, so that random numbers count; nothing is compared at the end."""
    config = tiny_config(chats, folder, **{"max_steps": 12, "learning_rate": "race", **training})
    config.peft_config["lora_dropout"] = 0.1
    config.evaluation.enabled = False
    return config


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def assert_equal(a: Path, b: Path) -> None:
    one, other = adapter(a), adapter(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def tree_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "tune.json").read_text()))


@pytest.fixture(scope="module")
def whole(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose rate a race decided, and what was shown. Read it, don't write into it."""
    file = io.StringIO()
    folder = tmp_path_factory.mktemp("race") / "run"
    run = train_config(config_of(chats, folder), Console(file=file, width=160))
    assert not run.stopped
    return run.path, file.getvalue()


def test_the_winner_of_a_race_is_the_run_with_its_rate_given(
    chats: Path, tmp_path: Path, whole: tuple[Path, str]
) -> None:
    path, shown = whole
    tree = tree_of(path)
    winner = tree["candidates"][tree["stages"][0]["winner"]]
    rates = [one["values"].get("learning_rate") for one in tree["candidates"]]
    losses = {
        one["number"]: one["losses"]["2"] * (1 + LEAD * (rate == max(rates)))
        for one, rate in zip(tree["candidates"], rates, strict=True)
    }
    assert len(losses) == 3
    assert winner["number"] == min(losses, key=losses.__getitem__)
    rate = winner["values"]["learning_rate"]
    train_only(config_of(chats, tmp_path / "alone", learning_rate=rate))
    assert_equal(path, tmp_path / "alone")
    text = (path / "config.yaml").read_text()
    assert text.splitlines()[1].startswith(f"# learning_rate: {rate:g} won a race of 3")
    assert f"learning_rate: {rate}" in text
    assert sorted(one.name for one in path.with_name("run-tune").iterdir()) == ["report.html", "study.db", "tune.json"]
    assert "How settings were chosen" in (path / "report.html").read_text()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13)), "no step twice"
    assert "It takes about" in shown


def test_a_race_that_was_killed_goes_on_and_comes_to_the_same(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, str]
) -> None:
    config, true, begun = config_of(chats, tmp_path / "run"), stretches.train_run, []

    def killed_once(run: Any, place: Any, **options: Any) -> Any:
        begun.append(run.config.output_dir.name)
        if len(begun) == 3:
            raise Killed
        return true(run, place, **options)

    monkeypatch.setattr(stretches, "train_run", killed_once)
    with pytest.raises(Killed):
        train_config(config, console)
    with pytest.raises(RunError, match="go on with --resume, or begin anew with --overwrite"):
        train_config(config, console)
    # Killed once more: the winner has moved, and its run has not gone on yet.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api_train, "_train_at", raise_killed)
        with pytest.raises(Killed):
            train_config(config, console, resume=True)
    assert begun == ["candidate-0", "candidate-1", "candidate-2", "candidate-2"]
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    run = train_config(config, console, resume=True)
    assert len(begun) == 4
    assert_equal(run.path, whole[0])
    with pytest.raises(RunError, match="holds a finished run"):
        train_config(config, console)
    (tmp_path / "run" / "results.json").unlink()
    remove(tmp_path / "run-tune")
    assert_equal(train_config(config, console, resume=True).path, whole[0])  # the run itself knows what was chosen


def test_a_move_that_was_killed_is_finished(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, str]
) -> None:
    config, true, moved = config_of(chats, tmp_path / "run"), module.move, []

    def killed_at_third(source: Any, target: Any) -> None:
        moved.append(source)
        if len(moved) == 3:
            raise Killed
        true(source, target)

    monkeypatch.setattr(module, "move", killed_at_third)
    with pytest.raises(Killed):
        train_config(config, console)
    assert_equal(train_config(config, console, resume=True).path, whole[0])


def test_a_stopped_race_says_how_it_goes_on(chats: Path, tmp_path: Path, console: Console, whole: Any) -> None:
    config = config_of(chats, tmp_path / "run")
    stopped = train_config(config, console, max_time=0.001)
    assert stopped.stopped
    assert stopped.path == tmp_path / "run-tune"
    assert not (tmp_path / "run").exists()
    assert_equal(train_config(config, console, resume=True).path, whole[0])


def test_a_race_goes_on_in_its_dtype_on_a_machine_that_would_choose_another(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(chats, tmp_path / "run")
    monkeypatch.setattr("phinetune.checkpoints.device.has_native_bf16", lambda device: True)
    assert train_config(config, console, max_time=0.001).stopped
    monkeypatch.setattr("phinetune.checkpoints.device.has_native_bf16", lambda device: False)
    run = train_config(config, console, resume=True)
    assert json.loads((run.path / "start.json").read_text())["decides"]["model.dtype"] == "torch.bfloat16"


def test_ranks_then_epochs_follow_the_rates(chats: Path, tmp_path: Path, console: Console) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=-1, num_train_epochs=2, eval_strategy="epoch")
    config.evaluation.enabled = False
    wish, study = Wish(rates=(1e-2, 3e-2), ranks=(2, 4), epochs=(1, 3)), tmp_path / "shared.log"
    run = tune_config(config, wish, console, study=str(study))
    tree = tree_of(run.path)
    assert [stage["key"] for stage in tree["stages"]] == ["learning_rate", "r", "num_train_epochs"]
    assert [one["values"].get("num_train_epochs") for one in tree["candidates"]] == [None, None, None, 1, 3]
    assert tree["candidates"][2]["values"]["r"] == 2
    assert study.is_file()
    assert not (tmp_path / "run-tune" / "study.db").exists()
    values = tree["candidates"][tree["stages"][-1]["winner"]]["values"]
    alone = tiny_config(
        chats, tmp_path / "alone", max_steps=-1, eval_strategy="epoch", learning_rate=values["learning_rate"]
    )
    alone.training_config["num_train_epochs"] = values.get("num_train_epochs", 2)
    alone.peft_config["r"] = values.get("r", 4)
    train_only(alone)
    assert_equal(run.path, tmp_path / "alone")
    config.training_config["seed"] = 7
    with pytest.raises(RunError, match="the study there is of another run"):
        tune_config(config, wish, console, study=str(study), overwrite=True)


def study_of(path: Path) -> Study:
    listed = {0: {"learning_rate": 1e-2}, 1: {"learning_rate": 5e-3}}
    return Study(str(path), "one", listed=listed, ranges={"learning_rate": (1e-3, 1e-1)}, options={}, field={}, seed=1)


def test_more_candidates_than_listed_are_looked_for_in_the_range(tmp_path: Path) -> None:
    study = study_of(tmp_path / "study.db")
    for number in range(6):
        one = study.ask()
        study.report(one.number, 2, 1.0 + number)
        study.drop(one.number)
    rates = [one.values["learning_rate"] for one in study_of(tmp_path / "study.db").candidates()]
    assert rates[:2] == [1e-2, 5e-3]
    assert len(set(rates)) == 6
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)


def test_a_race_goes_on_where_less_memory_is_free(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(chats, tmp_path / "run")
    config.training_config.pop("per_device_train_batch_size")
    config.training_config.pop("gradient_accumulation_steps", None)
    wish, study = Wish(rates=(1e-2, 2e-2)), str(tmp_path / "shared.db")
    first = tune_config(config, wish, console, study=study)
    monkeypatch.setattr(prepare, "_room", lambda *given: 60)
    assert prepare.prepare_run(prepare.settle(config)).args.per_device_train_batch_size == 1
    again = tune_config(config, wish, console, study=study, overwrite=True)
    assert tree_of(again.path)["stages"] == tree_of(first.path)["stages"]


@pytest.mark.parametrize("best", [2e-3, 5e-2])
def test_optuna_looks_near_the_best_although_it_still_runs(tmp_path: Path, best: float) -> None:
    """In a race those that lead are still running when others are asked for, and those that lose are out."""
    rates = (1e-3, 2e-3, 4e-3, 2e-2, 5e-2, 9e-2)
    listed = {number: {"learning_rate": rate} for number, rate in enumerate(rates)}
    near = 0
    for seed in range(8):
        where = str(tmp_path / f"{seed}.log")
        study = Study(
            where, "one", listed=dict(listed), ranges={"learning_rate": (1e-3, 1e-1)}, options={}, field={}, seed=seed
        )
        for rate in rates:
            one = study.ask()
            study.report(one.number, 2, abs(math.log(rate / best)))
            if abs(math.log(rate / best)) > 1:
                study.drop(one.number)
        near += abs(math.log(study.ask().values["learning_rate"] / best)) < 1.6
    assert near >= 6


def test_a_study_that_is_opened_again_looks_where_it_would_have_looked(tmp_path: Path) -> None:
    def rates(path: Path, *, again: bool) -> list[float]:
        study = study_of(path)
        for number in range(5):
            study = study_of(path) if again else study
            one = study.ask()
            study.report(one.number, 2, 1.0 + number)
            study.drop(one.number)
        return [one.values["learning_rate"] for one in study.candidates()]

    assert rates(tmp_path / "a.db", again=True) == rates(tmp_path / "b.db", again=False)


class OthersFirst(Study):
    """A study in which another process has begun and scored the first candidate."""

    owner: dict[str, Any]
    loss: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ask()
        self._attribute(0, OWNER, self.owner)
        self.report(0, 2, self.loss)


def test_processes_share_a_study_and_leave_each_other_their_candidates(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        OthersFirst.owner = {**this_process(), "pid": other.pid, "began": psutil.Process(other.pid).create_time()}
        OthersFirst.loss = 99.0
        monkeypatch.setattr(api_race, "Study", OthersFirst)
        run = tune_config(config_of(chats, tmp_path / "run"), Wish(rates=(1e-2, 2e-2)), console)
    finally:
        other.kill()
        other.wait()
    tree = tree_of(run.path)
    assert tree["stages"][0]["winner"] == 1
    assert tree["candidates"][0]["losses"] == {"2": 99.0}


def test_a_winner_on_another_host_is_left_to_it(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    OthersFirst.owner, OthersFirst.loss = {**this_process(), "host": "elsewhere"}, 0.5
    monkeypatch.setattr(api_race, "Study", OthersFirst)
    made = tune_config(config_of(chats, tmp_path / "run"), Wish(rates=(1e-2, 2e-2)), console)
    assert made.results["elsewhere"] == "candidate 0, was trained on elsewhere"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ago", [0, 3600], ids=["alive", "gone"])
def test_a_candidate_of_another_host_is_taken_over_when_it_gives_no_sign_of_life(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, ago: float
) -> None:
    class Gone(Study):
        """Another host has begun the first candidate; its last sign of life is so long ago."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.ask()
            self._attribute(0, OWNER, {**this_process(), "host": "elsewhere"})
            self._attribute(0, BEAT, time.time() - ago)

    class Waited(Exception):
        pass

    def wait(seconds: float) -> None:
        raise Waited

    monkeypatch.setattr(api_race, "Study", Gone)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=wait))
    with nullcontext() if ago else pytest.raises(Waited):
        run = tune_config(config_of(chats, tmp_path / "run"), Wish(rates=(1e-2, 2e-2)), console)
        assert [one["losses"] for one in tree_of(run.path)["candidates"]].count({}) == 0


def test_a_process_that_trains_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "BEAT_EVERY", 0.01)
    study = study_of(tmp_path / "study.db")
    number = study.ask().number
    assert study.candidates()[number].beat is None
    with study.beating(number):
        first = study.candidates()[number].beat
        deadline = time.monotonic() + 60
        while study.candidates()[number].beat == first and time.monotonic() < deadline:
            time.sleep(0.01)
    assert first is not None
    assert (study.candidates()[number].beat or 0) > first


def test_a_rate_that_ends_in_numbers_that_are_not_finite_is_out(chats: Path, tmp_path: Path, console: Console) -> None:
    run = tune_config(config_of(chats, tmp_path / "run"), Wish(rates=(1e-2, 1e30)), console)
    tree = tree_of(run.path)
    assert tree["candidates"][1]["losses"] == {"2": None}
    assert tree["stages"][0]["winner"] == 0


def test_preferences_race_by_their_own_loss(tmp_path: Path, console: Console) -> None:
    rows = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = config_of(data, tmp_path / "run").model_dump()
    tree["objective"] = {"kind": "dpo"}
    run = train_config(make_config(tree), console)
    losses = [one["losses"]["2"] for one in tree_of(run.path)["candidates"]]
    assert len(set(losses)) == 3
    assert all(0 < loss < 5 for loss in losses)


def test_no_race_around_a_rate_of_zero(chats: Path, tmp_path: Path, console: Console) -> None:
    with pytest.raises(ConfigError, match="give one above 0, or leave it out: rates are tried around it"):
        tune_config(config_of(chats, tmp_path / "run", learning_rate=0.0), Wish(), console)


def test_a_plan_says_what_a_race_adds(chats: Path, tmp_path: Path) -> None:
    notes = make_plan(config_of(chats, tmp_path / "run"), probe=False).notes
    assert any("It takes about" in note and "more time than the one run of 12 steps" in note for note in notes)


def test_a_race_without_held_out_rows_is_refused_with_what_to_do(chats: Path, tmp_path: Path, console: Console) -> None:
    config = config_of(chats, tmp_path / "run")
    config.data.eval = None
    for hold in (lambda: train_config(config, console), lambda: tune_config(config, Wish(), console)):
        with pytest.raises(ConfigError, match=r"set data\.eval \(a share such as 0\.1, or a file\)"):
            hold()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish(trials=0), "--trials 0: give 1 or more"),
        (Wish(trials=1, rates=(1e-3, 2e-3)), "--rates names 2"),
        (Wish(rates=(-1.0,)), "--rates: -1.0: must be above 0"),
        (Wish(ranks=(4, 4)), "--ranks: a value stands there twice"),
        (Wish(epochs=(2,)), "max_steps says how many steps"),
    ],
)
def test_a_wish_that_can_not_be_is_refused(
    chats: Path, tmp_path: Path, console: Console, wish: Wish, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tune_config(config_of(chats, tmp_path / "run"), wish, console)


def test_a_storage_that_can_not_be_opened_is_a_sentence(chats: Path, tmp_path: Path, console: Console) -> None:
    with pytest.raises(ConfigError, match="--study nowhere://x"):
        tune_config(config_of(chats, tmp_path / "run"), Wish(), console, study="nowhere://x")


def test_a_higher_rate_that_leads_by_little_so_early_does_not_win(
    chats: Path, tmp_path: Path, console: Console
) -> None:
    config = config_of(chats, tmp_path / "run", learning_rate=1e-4)
    tree = tree_of(tune_config(config, Wish(rates=(1e-4, 2e-4)), console).path)
    own, higher = (one["losses"]["2"] for one in tree["candidates"])
    assert higher < own < higher * (1 + LEAD)
    assert tree["stages"][0]["winner"] == 0
    assert tree["why"][0].endswith("; so early a rate above 0.0001 counts as better if it leads by 5%")


def test_a_higher_rate_wins_by_a_clear_lead_and_a_lower_one_by_any(chats: Path, tmp_path: Path) -> None:
    rows = prepare.prepare_rows(prepare.settle(config_of(chats, tmp_path / "run", learning_rate=1e-4)))
    entry = Entry.of(rows, Wish(rates=(1e-4, 2e-4, 5e-5), ranks=(2, 4)))

    def winner(stage: Stage, *losses: float) -> int | None:
        rates = [{"learning_rate": rate} for rate in (1e-4, 2e-4, 5e-5)]
        scores = {i: entry.weighed(stage, rates[i], {9: loss}) for i, loss in enumerate(losses)}
        return halving.decide(3, halving.at_the_end(9), scores).winner

    of_rates, of_ranks = entry.stages
    assert winner(of_rates, 1.0, 0.96, 1.1) == 0
    assert winner(of_rates, 1.0, 0.95, 1.1) == 1
    assert winner(of_rates, 1.0, 0.96, 0.999) == 2
    assert winner(of_rates, -1.0, -1.04, -0.9) == 0
    assert winner(of_ranks, 1.0, 0.999, 1.1) == 1, "ranks have no such lead"


def test_a_line_is_said_only_where_the_lead_decided(chats: Path, tmp_path: Path) -> None:
    rows = prepare.prepare_rows(prepare.settle(config_of(chats, tmp_path / "run", learning_rate=1e-4)))
    entry = Entry.of(rows, Wish(rates=(1e-4, 2e-4, 5e-5)))
    race: Any = SimpleNamespace(entry=entry)

    def line(own: dict[int, float], higher: dict[int, float]) -> str:
        scores = own, higher, {2: 9.0}
        rates = (1e-4, 2e-4, 5e-5)
        known = [Candidate(i, {"learning_rate": rates[i]}, scores[i], "running", {}) for i in range(3)]
        return module.Race._held_back(race, entry.stages[0], 0, known)

    assert line({2: 1.0, 5: 0.8}, {2: 0.97}) == "; so early a rate above 0.0001 counts as better if it leads by 5%"
    assert "leads by 5%" in line({2: 1.0, 5: 0.8}, {2: 1.1, 5: 0.79})
    assert line({2: 1.0, 5: 0.8}, {2: 0.97, 5: 0.9}) == "", "it led once, and was behind in the end"
