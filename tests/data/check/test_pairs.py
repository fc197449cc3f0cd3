"""What the check finds in pairs: equal and empty answers, unlike prompts, and a length that tells them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.cli_helpers import run
from data.check.check_helpers import ENCODER
from helpers import TINY, write_jsonl
from phinetune.config.data import DataSection
from phinetune.data.prepare.copies import key_of
from phinetune.data.prepare.encode_answers import JudgedRows, PairRows
from phinetune.data.preview import preview_rows
from phinetune.data.read.row import Row


def pair(i: int, chosen: str = "", rejected: str = "") -> dict[str, Any]:
    """A sound pair, unless its answers are given."""
    return {
        "prompt": f"How far is camp {i}?",
        "chosen": chosen or f"It is {i} km.",
        "rejected": rejected or f"No idea about {i}.",
    }


def judged(i: int, liked: bool = True, answer: str = "") -> dict[str, Any]:
    return {"prompt": f"How far is camp {i}?", "completion": answer or f"It is {i} km.", "label": liked}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def found(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str = "dpo") -> Any:
    run(monkeypatch, "data", "check", file, "--json", "--set", f"model.path={TINY}", "--set", f"objective.kind={kind}")
    report = json.loads(capsys.readouterr().out)
    return {one["kind"]: one["places"] for one in report["findings"]}


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        (pair(3, "It is 3 km.", "It is 3 km."), "equal_answers", ""),
        (pair(3, "   "), "empty_answer", "turn 2"),
        (pair(3, rejected="  "), "empty_answer", "the rejected one"),
        ({"chosen": turns("How far?", "5"), "rejected": turns("How long?", "5")}, "prompts", "no prompt in common"),
        ({"chosen": turns("Hi", "Ho", "How?", "5"), "rejected": turns("Hi", "Ho", "So?", "6")}, "prompts", "at turn 3"),
    ],
    ids=["equal", "empty chosen", "empty rejected", "two prompts", "two last questions"],
)
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_each_spoiled_pair_gets_its_finding(
    row: Any,
    kind: str,
    detail: str,
    objective: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [pair(0), pair(1), row])
    places = found(file, monkeypatch, capsys, objective)[kind]
    assert places[0]["where"] == f"{file}:3"
    assert detail in places[0]["detail"]


def test_longer_chosen_answers_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    even = [pair(i) for i in range(8)]
    assert "length_bias" not in found(write_jsonl(tmp_path / "even.jsonl", even), monkeypatch, capsys)
    biased = [pair(i, f"It is {i} km, as the crow flies, and more on foot.") for i in range(8)]
    (place,) = found(write_jsonl(tmp_path / "biased.jsonl", biased), monkeypatch, capsys)["length_bias"]
    assert "200% longer (12 words against 4); in 100%" in place["detail"]
    assert "length_bias" not in found(tmp_path / "biased.jsonl", monkeypatch, capsys, "kto")


@pytest.mark.parametrize(("kind", "names"), [("dpo", ("chosen", "rejected")), ("kto", ("good", "not good"))])
def test_a_preview_shows_both_answers(
    kind: str, names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """For kto they are two examples, each with its prompt."""
    file = write_jsonl(tmp_path / "pairs.jsonl", [pair(7)])
    options = ("--set", f"model.path={TINY}", "--set", f"objective.kind={kind}")
    assert run(monkeypatch, "data", "preview", file, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("How far is camp 7?" in line for line in lines) == (1 if kind == "dpo" else 2)
    shown = {line.split("│")[0].strip(): line for line in lines if "│" in line}
    assert "It is 7 km." in shown[names[0]].replace("⟦", "")
    assert "No idea about 7." in shown[names[1]].replace("⟦", "")
    assert "pieces" not in lines[0]


def test_a_preview_says_which_answer_is_left_out(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [pair(7, rejected="No! " * 50), pair(8, "Oh! " * 50, "No! " * 50)])
    shown, dropped = preview_rows(str(file), JudgedRows(DataSection(), ENCODER, 60), 2)
    assert shown.problem is None
    assert [turn.remark for turn in shown.turns if turn.remark] == ["✂ an answer is left out: longer than 60 tokens"]
    assert dropped.problem == "longer than 60 tokens"


FAR = "It lies behind the second ridge, four hours on foot from the lake, and the last hour is steep. "


@pytest.mark.parametrize(
    ("rows", "kind", "wanted"),
    [
        ([pair(1), pair(1)], "dpo", {"duplicate"}),
        ([pair(1), pair(1)], "kto", {"duplicate"}),
        ([pair(1), pair(1, rejected="Nobody knows.")], "dpo", set()),
        ([pair(1), pair(1, rejected="Nobody knows.")], "kto", set()),
        ([pair(1, FAR), pair(1, FAR, "No.")], "dpo", {"near"}),
        ([pair(1, "A", "B"), pair(1, "B", "A")], "dpo", {"contradiction"}),
        ([pair(1, "A", "B"), pair(1, "B", "A")], "kto", {"contradiction"}),
        ([judged(1), judged(1)], "kto", {"duplicate"}),
        ([judged(1), judged(1, False)], "kto", {"contradiction"}),
        ([judged(1, False), judged(1)], "kto", {"contradiction"}),
        ([judged(1), judged(1, False, "No.")], "kto", set()),
    ],
)
def test_pairs_are_alike_as_a_whole_and_judged_rows_with_their_verdict(
    rows: list[Any], kind: str, wanted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`--fix` would leave out whatever counts as a duplicate."""
    places = found(write_jsonl(tmp_path / "rows.jsonl", rows), monkeypatch, capsys, kind)
    compared = {"duplicate", "near", "contradiction"} & places.keys()
    assert compared == wanted
    assert all(one["where"].endswith(":2") for name in wanted for one in places[name])


def test_a_pair_is_held_out_only_with_both_of_its_answers() -> None:
    """Rows that share less are no copies, but stay on one side by their question."""
    rows = [pair(1), pair(1), pair(1, rejected="Nobody knows.")]
    made = list(PairRows(DataSection(), ENCODER, None)(Row(f"a:{i}", row) for i, row in enumerate(rows)))
    keys = [key_of(one) for one in made]
    assert keys[0] == keys[1]
    assert keys[0][0] != keys[2][0]
    assert keys[0][1] == keys[2][1]


@pytest.mark.parametrize("page", ["preferences.md", "preferences.zh.md"])
def test_the_commands_of_the_how_to_read_pairs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """They stand before any configuration, whose objective would say what the rows are."""
    text = (Path(__file__).parents[3] / "docs" / "how-to" / page).read_text(encoding="utf-8")
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("phinetune data ")]
    assert [command[1] for command in commands] == ["check", "preview"]
    write_jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(3)])
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert run(monkeypatch, *command, "--set", f"model.path={TINY}") == 0
        assert "no known form" not in capsys.readouterr().out
