"""Data that a Python program holds stands wherever a file may: the same rows give the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from rich.console import Console

from helpers import TINY, write_jsonl
from phinetune import check, evaluate, plan, preview, train
from phinetune.api.sections import holds_data, make_sections
from phinetune.checkpoints.tokenizer import open_tokenizer
from phinetune.data.prepare.build_sets import build_chats
from phinetune.errors import DataError, PhinetuneError, RunError
from phinetune.run_folder import RunFolder
from phinetune.training.prepare import settle
from phinetune.training.recorded import rows_digest

ROWS = [{"asked": f"How far is town {i}?", "said": f"It is {i} miles.", "n": i, "day": None} for i in range(24)]
COLUMNS = {"columns": {"user": "asked", "assistant": "said"}, "prompt": None}
QUIET = Console(quiet=True)


def generator() -> Iterator[dict[str, Any]]:
    yield from ROWS


class Indexed:
    """A data set as torch has them."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return ROWS[place]


KINDS: dict[str, Callable[[Path], Any]] = {
    "file": lambda folder: write_jsonl(folder / "rows.jsonl", ROWS),
    "list": lambda folder: ROWS,
    "generator": lambda folder: generator(),
    "iterator": lambda folder: iter(ROWS),
    "map-style": lambda folder: Indexed(),
    "Dataset": lambda folder: datasets.Dataset.from_list(ROWS),
    "DatasetDict": lambda folder: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
    "IterableDataset": lambda folder: datasets.IterableDataset.from_generator(generator),
    "pandas": lambda folder: pandas.DataFrame(ROWS),
    "list of one": lambda folder: [datasets.Dataset.from_list(ROWS)],
}

if find_spec("polars"):  # it has no release for Python 3.10
    import polars

    KINDS["polars"] = lambda folder: polars.DataFrame(ROWS)
    KINDS["polars lazy"] = lambda folder: polars.LazyFrame(ROWS)


def config_of(data: Any, **more: Any) -> Any:
    return make_sections(model=TINY, data={"train": data, **COLUMNS, **more}, training_config={"max_length": 64})


@holds_data
def digests(data: Any, **more: Any) -> tuple[Any, ...]:
    """What the run's rows come to: ids and labels of both sides."""
    settled = settle(config_of(data, **more))
    chats = build_chats(settled.row_encoder(open_tokenizer(settled.config.model)))
    assert chats.held_out
    return rows_digest(chats.train), rows_digest(chats.held_out), chats.train.report.to_dict() | {"source": ""}


@pytest.mark.parametrize("small", [True, False], ids=["in memory", "as Arrow files"])
def test_the_same_rows_in_every_form_give_the_same_ids_and_masks(
    tmp_path: Path, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr("phinetune.data.prepare.build_sets.SMALL", 10)
        monkeypatch.setattr("phinetune.data.prepare.arrow_table.cores", lambda: 1)
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    found = {name: digests(make(tmp_path), eval=0.25) for name, make in KINDS.items()}
    assert {name: one == found["file"] for name, one in found.items()} == dict.fromkeys(KINDS, True)
    assert found["file"][2]["kept"] == 18


def run_on(data: Any, folder: Path, steps: int = 4, **options: Any) -> Any:
    training = {
        "output_dir": str(folder),
        "max_steps": steps,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    section = {"train": data, "eval": 0.25, **COLUMNS}
    return train(TINY, section, {"r": 4}, training, {"generate": False}, console=QUIET, **options)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_on_rows_in_memory_is_the_run_on_their_file_and_goes_on(tmp_path: Path) -> None:
    run_on(KINDS["file"](tmp_path), tmp_path / "file")
    run_on(pandas.DataFrame(ROWS), tmp_path / "frame")
    assert losses(tmp_path / "frame") == losses(tmp_path / "file")
    recorded = RunFolder(tmp_path / "frame").read_config().data
    assert recorded.train.startswith("pandas frame of 24 rows (sha256 ")
    run_on(generator(), tmp_path / "part")
    checkpoint = {"resume": True}
    for name in ("results.json", "adapter_model.safetensors"):
        (tmp_path / "part" / name).unlink()
    for later in sorted((tmp_path / "part").glob("checkpoint-4")):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    other = [*ROWS[:-1], {**ROWS[-1], "said": "It is near."}]
    with pytest.raises(RunError) as refused:
        run_on(iter(other), tmp_path / "part", **checkpoint)
    told = str(refused.value)
    assert "SHA-256" in told
    assert "data.train: the run has generator of 24 rows (sha256 " in told
    assert "the configuration now has iterator of 24 rows (sha256 " in told
    run_on(ROWS, tmp_path / "part", **checkpoint)
    assert losses(tmp_path / "part") == losses(tmp_path / "file")


def test_a_configuration_that_names_rows_in_memory_says_so_without_them(tmp_path: Path) -> None:
    run = run_on(ROWS, tmp_path / "run", steps=2)
    with pytest.raises(DataError, match=r"list of 24 rows .* in a Python program's memory"):
        evaluate(run.path, evaluation={"generate": False}, console=QUIET)
    again = evaluate(run.path, ROWS[:4], {"generate": False}, console=QUIET)
    assert again.data["kept"] == 4


def test_every_verb_takes_them(tmp_path: Path) -> None:
    frame, columns = pandas.DataFrame(ROWS), {"columns": COLUMNS["columns"]}
    found = check({"train": frame, **columns}, model=TINY)
    assert (found.report.counts.kept, found.report.spoiled) == (24, False)
    assert found.report.counts.unused_values == {"n": 24}
    shared = check({"train": frame, **columns}, held_out=ROWS[:2], model=TINY)
    assert "rows that stand in training" in str(shared.to_dict()["findings"])
    shown = preview(generator(), 1, model=TINY, data=columns)
    assert (shown[0].where, shown[0].form, shown[0].unused) == ("row 1 of the generator of file", "messages", ["n"])
    made = plan(TINY, {"train": frame, **columns}, training_config={"output_dir": str(tmp_path)}, probe=False)
    assert made


def test_splits_of_a_dictionary_of_sets(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:20]), "validation": datasets.Dataset.from_list(ROWS[20:])}
    held = datasets.DatasetDict(parts)
    _, _, report = digests(held, eval={"split": "validation"})
    assert report["kept"] == 20
    with pytest.raises(PhinetuneError, match=r"the split `train` of DatasetDict.* there are the splits validation"):
        digests(held, eval={"split": "train"})
    with pytest.raises(PhinetuneError, match="there is no split `dev`; there are train, validation"):
        digests(held, eval={"split": "dev"})
    with pytest.raises(PhinetuneError, match=r"list of 24 rows .* is in memory, which has no splits"):
        digests(ROWS, split="dev", eval=0.5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([ROWS[0], 5], "row 2 of the list: expected a dict, found int"),
        ([[{"role": "user", "content": "x"}]], "a chat is a dict such as"),
        ((row for row in ()), "an iterator can be read once, so make a new one"),
        ((1 / i for i in (1, 0)), "row 2 of the generator: the generator failed: .*division"),
        (object(), "data.train: object is no kind of data; give a file, a datasets.Dataset"),
        ([], "data.train: the list is empty"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "two columns `a`"),
        (
            [ROWS[0], {"asked": "x", "said": ""}, *ROWS[2:]],
            "row 2 of the list: `said` .data.columns: assistant. is empty",
        ),
    ],
    ids=["row", "turns", "empty", "failing", "object", "no rows", "twice", "no answer"],
)
def test_a_mistake_names_the_row(data: Any, words: str) -> None:
    with pytest.raises(PhinetuneError, match=words):
        digests(data, eval=0.5)


def test_the_final_verdict_is_on_the_test_split(tmp_path: Path) -> None:
    parts = {"train": ROWS[:16], "validation": ROWS[16:20], "test": ROWS[20:]}
    held = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    section = {"train": held, "eval": {"split": "validation"}, "test": {"split": "test"}, **COLUMNS}
    run = train(TINY, section, {"r": 4}, training, {"generate": False}, console=QUIET)
    sets = run.results["data"]
    assert [sets[name]["kept"] for name in ("train", "held_out", "test")] == [16, 4, 4]
    assert sets["overlap"]["rows"] == 4
    card, page = (run.path / "README.md").read_text(), (run.path / "report.html").read_text()
    assert "## Results on test chats" in card
    assert "Results on test chats" in page
    assert "on 4 test chats" in page
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    last = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    verdict = run.results["evaluation"]["tuned"]["loss"]
    assert verdict != pytest.approx(last, rel=1e-6)
    again = evaluate(run.path, held["test"], {"generate": False}, console=QUIET)
    assert again.results["tuned"]["loss"] == pytest.approx(verdict, rel=1e-6)


def test_a_test_set_may_be_neither_trained_on_nor_held_out(tmp_path: Path) -> None:
    with pytest.raises(PhinetuneError, match=r"data.test: .*these are the rows that are trained on; give other rows"):
        digests(ROWS, eval=0.25, test=list(ROWS))
    with pytest.raises(PhinetuneError, match=r"data.test: list of 4 rows .* is data.eval, too"):
        digests(ROWS[:20], eval=ROWS[20:], test=ROWS[20:])


def test_a_generator_may_be_given_again_while_it_lives() -> None:
    rows = generator()
    assert digests(rows, eval=0.5) == digests(rows, eval=0.5)
