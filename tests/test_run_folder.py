"""Whose a folder is, and which checkpoints count."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny_config
from phinetune.errors import RunError
from phinetune.run_folder import RESUMABLE, RunFolder


def make_run(path: Path, finished: bool = False, checkpoints: tuple[int, ...] = ()) -> RunFolder:
    folder = RunFolder(path)
    folder.start(tiny_config(Path("chats.jsonl"), path), None)
    for step in checkpoints:
        (path / f"checkpoint-{step}").mkdir()
        for name in RESUMABLE:
            (path / f"checkpoint-{step}" / name).write_text("x")
    if finished:
        folder.write_results({})
    return folder


def test_a_new_or_empty_folder_is_free(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").check_free(overwrite=False)
    RunFolder(tmp_path).check_free(overwrite=False)


def test_a_run_that_saved_nothing_may_be_started_again(tmp_path: Path) -> None:
    make_run(tmp_path / "run").check_free(overwrite=False)


@pytest.mark.parametrize(
    ("finished", "words"), [(True, "holds a finished run"), (False, "has not ended; go on with --resume")]
)
def test_a_run_is_only_replaced_when_asked(tmp_path: Path, finished: bool, words: str) -> None:
    folder = make_run(tmp_path / "run", finished, checkpoints=(3,))
    with pytest.raises(RunError, match=words):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)
    assert folder.is_finished is finished  # checking touches nothing


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        RunFolder(tmp_path / "run").check_free(overwrite=True)


def test_starting_anew_clears_the_runs_own_files_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=True, checkpoints=(3,))
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "checkpoint-best").mkdir()
    folder.start(tiny_config(Path("other.jsonl"), folder.path), None)
    assert {p.name for p in folder.path.iterdir()} == {"config.yaml", "notes.txt", "checkpoint-best"}


def test_only_whole_checkpoints_count_and_the_newest_is_resumed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(9, 10, 100))
    (folder.path / "checkpoint-100" / RESUMABLE[-1]).unlink()
    config = folder.read_config()
    assert [p.name for p in folder.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    assert folder.checkpoint_to_resume(config) == folder.path / "checkpoint-10"


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to go on with"):
        RunFolder(tmp_path).checkpoint_to_resume(tiny_config(Path("x"), tmp_path))
    folder = make_run(tmp_path / "run")
    assert folder.checkpoint_to_resume(folder.read_config()) is None


def test_the_configuration_is_pinned_to_the_commit(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(tiny_config(Path("x"), tmp_path / "run"), "abc123")
    assert folder.read_config().model.revision == "abc123"
