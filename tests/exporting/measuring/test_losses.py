"""What a written file loses is measured by running it: its held-out loss and answers beside the run's own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cli.cli_helpers import run
from phinetune.api.export import export_types
from phinetune.errors import ModelError
from phinetune.exporting.measuring.losses import Agreement, Measured, agreement
from phinetune.screen.exports import sentences


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], Agreement(1, 1, 1.0)),
        ([[1, 2, 3], [4]], [[1, 9, 3], [4]], Agreement(2, 1, 0.5)),
        ([[1, 2]], [[1, 2, 3, 4]], Agreement(1, 0, 0.5)),
        ([[]], [[]], Agreement(1, 1, 1.0)),
    ],
    ids=["same", "one differs", "longer", "empty"],
)
def test_answers_agree_up_to_their_first_difference(
    own: list[list[int]], theirs: list[list[int]], expected: Agreement
) -> None:
    assert agreement(own, theirs) == expected


def test_the_cost_is_said_against_the_run() -> None:
    losses = {"the run": 1.0, "a.gguf": 1.0213, "b.gguf": 1.0001, "c.gguf": 0.99, "onnx": None}
    assert sentences([Measured(*one) for one in losses.items()]) == [
        "a.gguf costs 0.021 nats here",
        "b.gguf costs nothing that shows in three digits here",
        "c.gguf has 0.010 nats less here",
    ]


def test_a_file_in_full_precision_has_the_runs_own_loss_and_answers(tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    shown = io.StringIO()
    done, (own, file) = export_types(
        tiny_run, "gguf", ["f32"], out=tmp_path / "a.gguf", measure=True, console=Console(file=shown, width=120)
    )
    assert done[0].path == tmp_path / "a.gguf"
    assert own.loss is not None
    assert file.loss == pytest.approx(own.loss, abs=2e-3)  # llama.cpp keeps keys and values in float16
    assert file.agreement is not None
    assert file.agreement.answers == file.agreement.same
    assert "a.gguf" in shown.getvalue()
    assert f"{own.loss:.4f}" in shown.getvalue()


def test_a_part_of_a_model_and_a_run_without_held_out_chats_are_refused_first(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--measure runs a whole model"):
        export_types(tiny_run, "gguf-lora", ["f16"], out=tmp_path / "a.gguf", measure=True)
    assert not list(tmp_path.iterdir())


def test_several_types_need_several_places(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="--out names one place, and 2 types"):
        export_types(tiny_run, "gguf", ["f16", "q8_0"], out=tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="--to ollama writes one place"):
        export_types(tiny_run, "ollama", ["f16", "q8_0"])
    assert not list(tmp_path.iterdir())
    result = run(monkeypatch, "export", tiny_run, "--to", "gguf", "--type", "f16,q8_0")
    assert result == 0
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-f16.gguf", "tiny-q8_0.gguf"}
