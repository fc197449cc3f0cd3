"""Whose a folder is, and which checkpoints count."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny_config
from phinetune.errors import RunError
from phinetune.run_folder import RESUMABLE, RunFolder, told_changes


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
    assert [p.name for p in folder.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    assert folder.checkpoint_to_resume() == folder.path / "checkpoint-10"


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to go on with"):
        RunFolder(tmp_path).checkpoint_to_resume()
    with pytest.raises(RunError, match=r"^training_config\.resume_from_checkpoint: nowhere: .*; leave the key out"):
        RunFolder(tmp_path).checkpoint_to_resume(Path("nowhere"))
    folder = make_run(tmp_path / "run")
    assert folder.checkpoint_to_resume() is None


def test_the_configuration_is_pinned_to_the_commit(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(tiny_config(Path("x"), tmp_path / "run"), "abc123")
    assert folder.read_config().model.revision == "abc123"


def test_a_run_without_a_checkpoint_to_go_on_from_is_never_begun_again_over_what_it_holds(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(3,))
    (folder.path / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(RunError, match=r"checkpoint-3 can't be gone on from, since it lacks optimizer\.pt"):
        folder.checkpoint_to_resume()
    with pytest.raises(RunError, match="checkpoints that a run can't go on from"):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)
    finished = make_run(tmp_path / "finished", finished=True)
    with pytest.raises(RunError, match="finished run without checkpoints"):
        finished.checkpoint_to_resume()


@pytest.mark.parametrize("place", ["checkpoint-10", "."])
def test_a_named_checkpoint_is_the_newest_of_this_run(tmp_path: Path, place: str) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(9, 10))
    assert folder.checkpoint_to_resume(folder.path / place) == folder.path / "checkpoint-10"
    with pytest.raises(RunError, match="checkpoint-10 is newer"):
        folder.checkpoint_to_resume(folder.path / "checkpoint-9")
    with pytest.raises(RunError, match=r"^training_config\.resume_from_checkpoint: .*no checkpoint that the run in"):
        folder.checkpoint_to_resume(tmp_path / "other" / place)


def test_a_wish_to_resume_is_not_part_of_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(tiny_config(Path("x"), folder.path, resume_from_checkpoint=True), None)
    assert "resume_from_checkpoint" not in folder.read_config().training_config


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_a_start_record_that_can_not_be_read_is_none(tmp_path: Path, text: str) -> None:
    folder = make_run(tmp_path / "run")
    assert folder.read_start() == {}
    (folder.path / "start.json").write_text(text)
    assert folder.read_start() == {}


def test_changes_are_told_in_sentences() -> None:
    changed = [{"step": 4, "what": ["a 1 → 3", "b changed"]}, {"step": 9, "what": ["a 3 → 1"]}]
    assert told_changes(changed) == [
        "Resumed with something changed at step 4: a 1 → 3, b changed.",
        "Resumed with something changed at step 9: a 3 → 1.",
    ]
    assert told_changes(None) == []
