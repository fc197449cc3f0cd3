"""Whose a folder is, and which checkpoints count."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import tiny_config
from phinetune.errors import RunError
from phinetune.manifest import write_manifest
from phinetune.run_folder import DEEPSPEED, OPTIMIZER, RESUMABLE, RunFolder, told_changes

FILES = (*RESUMABLE, "rng_state.pth")


def make_checkpoint(path: Path, text: str = "x") -> Path:
    path.mkdir()
    for name in FILES:
        (path / name).write_text(text)
    write_manifest(path)
    return path


def make_run(path: Path, finished: bool = False, checkpoints: tuple[int, ...] = ()) -> RunFolder:
    folder = RunFolder(path)
    folder.start(tiny_config(Path("chats.jsonl"), path), None)
    for step in checkpoints:
        make_checkpoint(path / f"checkpoint-{step}")
    if finished:
        folder.write_results({})
    return folder


def content(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


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


def test_only_whole_checkpoints_count_and_the_newest_is_resumed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(9, 10, 100))
    (folder.path / "checkpoint-100" / RESUMABLE[-1]).unlink()
    assert [p.name for p in folder.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    assert folder.checkpoint_to_resume() == folder.path / "checkpoint-10"


def test_what_deepspeeds_optimizer_knows_lies_elsewhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(4, 8))
    newest = folder.path / "checkpoint-8"
    (newest / OPTIMIZER).unlink()
    write_manifest(newest)
    assert folder.checkpoint_to_resume() == folder.path / "checkpoint-4"
    (newest / DEEPSPEED).write_text("global_step8")
    write_manifest(newest)
    assert folder.checkpoint_to_resume() == newest


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
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):  # as with save_only_model
        (folder.path / "checkpoint-3" / name).unlink()
    write_manifest(folder.path / "checkpoint-3")
    with pytest.raises(
        RunError,
        match=r"checkpoint-3 can't be gone on from, since it lacks optimizer\.pt, scheduler\.pt, rng_state\.pth ",
    ):
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


# ---- damaged checkpoints


def flip(file: Path) -> None:
    """Turn one bit in the middle over."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "is damaged (its SHA-256 is not that of manifest.json)"),
    "empty": (lambda file: file.write_bytes(b""), "has 0 bytes instead of 1"),
    "longer": (lambda file: file.write_text("xx"), "has 2 bytes instead of 1"),
    "missing": (Path.unlink, "is missing"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is missing"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(1, 2, 3))
    spoil, words = HARM[harm]
    spoil(folder.path / "checkpoint-3" / name)
    assert folder.checkpoint_to_resume() == folder.path / "checkpoint-2"
    assert f"checkpoint-3 is not used, since {name} {words}; going on from checkpoint-2" in caplog.text
    with pytest.raises(RunError, match=re.escape(f"checkpoint-3 can't be gone on from, since {name} {words}")):
        folder.checkpoint_to_resume(folder.path / "checkpoint-3")
    assert folder.checkpoint_to_resume(folder.path / "checkpoint-2") == folder.path / "checkpoint-2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        ('{"files": {"optimizer.pt": null}}', "manifest.json is damaged"),
        ('{"files": {}}', "manifest.json names no file"),
        ('{"files": {"/dev/zero": {"size": 1, "sha256": ""}}}', "/dev/zero is missing"),
        ('{"files": {"../config.yaml": {"size": 1, "sha256": ""}}}', "../config.yaml is missing"),
    ],
)
def test_a_damaged_manifest_vouches_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, words: str
) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(1, 2))
    (folder.path / "checkpoint-2" / "manifest.json").write_text(text)
    assert folder.checkpoint_to_resume() == folder.path / "checkpoint-1"
    assert f"checkpoint-2 is not used, since {words}" in caplog.text


def test_where_no_checkpoint_is_whole_all_are_named_and_nothing_is_deleted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(1, 2))
    flip(folder.path / "checkpoint-1" / "scheduler.pt")
    (folder.path / "checkpoint-2" / "rng_state.pth").unlink()
    before = content(folder.path)
    with pytest.raises(RunError) as caught:
        folder.checkpoint_to_resume()
    assert "checkpoint-2 can't be gone on from, since rng_state.pth is missing" in caught.value.problems[0]
    assert "checkpoint-1 can't be gone on from, since scheduler.pt is damaged" in caught.value.problems[1]
    assert content(folder.path) == before


def test_a_damaged_final_adapter_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_run(tmp_path / "run", finished=True, checkpoints=(1,))
    (folder.path / "adapter_model.safetensors").write_text("x")
    write_manifest(folder.path)
    folder.checkpoint_to_resume()
    assert not caplog.text
    flip(folder.path / "adapter_model.safetensors")
    folder.checkpoint_to_resume()
    assert "adapter_model.safetensors is damaged" in caplog.text
    assert "written again at the end of the run" in caplog.text


# ---- what is trained is not thrown away


def test_an_adapter_whose_comparison_was_never_made_is_work(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder.path / "adapter_model.safetensors").write_text("x")
    with pytest.raises(RunError, match=r"trained adapter without checkpoints: .* compare it with `phinetune evaluate"):
        folder.checkpoint_to_resume()
    with pytest.raises(RunError, match="holds a trained adapter"):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)


def test_a_run_that_stopped_early_is_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", checkpoints=(4,))
    folder.check_not_stopped_early()
    folder.write_results({"training": {"stopped_early": False, "steps": 4}})
    folder.check_not_stopped_early()
    folder.write_results({"training": {"stopped_early": True, "steps": 4}})
    with pytest.raises(RunError, match=r"has stopped early at step 4, .* and is finished"):
        folder.check_not_stopped_early()


def other(folder: RunFolder) -> None:
    """Begin another run in the same folder."""
    folder.start(tiny_config(Path("other.jsonl"), folder.path), None)


def full_run(path: Path) -> RunFolder:
    folder = make_run(path, finished=True, checkpoints=(3, 6))
    (path / "metrics.jsonl").write_text("old")
    (path / "notes.txt").write_text("mine")
    (path / "checkpoint-best").mkdir()
    return folder


def test_a_replaced_run_is_kept_until_its_successor_has_a_checkpoint(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    other(folder)
    assert folder.read_config().data.train != str(Path("chats.jsonl").absolute())
    assert {p.name for p in folder.path.iterdir()} == {"config.yaml", "notes.txt", "checkpoint-best", ".replaced"}
    folder.replace()
    assert (folder.path / ".replaced" / "checkpoint-6").is_dir()
    make_checkpoint(folder.path / "checkpoint-1")
    folder.replace()
    assert {p.name for p in folder.path.iterdir()} == {"config.yaml", "notes.txt", "checkpoint-best", "checkpoint-1"}


@pytest.mark.parametrize("stage", ["nothing", "lines", "half a checkpoint"])
def test_a_run_comes_back_if_its_successor_stopped_before_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    folder = full_run(tmp_path / "run")
    before = content(folder.path)
    other(folder)
    if stage == "lines":
        (folder.path / "metrics.jsonl").write_text("new")
    if stage == "half a checkpoint":
        (folder.path / ".checkpoint-1.partial-0").mkdir()
        (folder.path / "checkpoint-2").mkdir()
    folder.tidy()
    assert content(folder.path) == before
    assert "the earlier run is back" in caplog.text


@pytest.mark.parametrize("call", ["os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"])
def test_at_every_operation_of_a_replacement_a_killed_process_leaves_the_old_run_or_the_new_one(
    tmp_path: Path, call: str
) -> None:
    """A forked process replaces the run, puts it back, replaces it again, and dies at its n-th operation."""
    whole = content(full_run(tmp_path / "whole").path)
    died = at = 0
    while died == at:
        at += 1
        folder = full_run(tmp_path / f"run-{at}")
        died += _dies(folder, call, at)
        RunFolder(folder.path).tidy()
        left = content(folder.path)
        assert folder.is_run
        old = {name: text.replace("whole", f"run-{at}") for name, text in whole.items()}
        assert left == old or "checkpoint-1/optimizer.pt" in left, (at, sorted(left))
        assert not [p for p in folder.path.iterdir() if p.name.startswith(".")]
        assert left["notes.txt"] == "mine"
    assert died


def _dies(folder: RunFolder, call: str, at: int) -> int:
    """Whether a process that dies at the n-th call of a function came so far."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return int(status != 0)
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        seen += event == call
        if event == call and seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        other(folder)
        folder.tidy()
        other(folder)
        make_checkpoint(folder.path / "checkpoint-1", "new")
        folder.replace()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("kind", ["checkpoint", "file", "checkpoint that is a file", "dangling"])
def test_links_are_replaced_and_what_they_point_to_stays(tmp_path: Path, kind: str) -> None:
    folder = make_run(tmp_path / "run", finished=True, checkpoints=(3,))
    elsewhere = make_checkpoint(tmp_path / "elsewhere")
    if kind == "checkpoint":
        (folder.path / "checkpoint-9").symlink_to(elsewhere)
    elif kind == "file":
        (folder.path / "metrics.jsonl").symlink_to(elsewhere / "optimizer.pt")
    elif kind == "dangling":
        (folder.path / "checkpoint-9").symlink_to(tmp_path / "nowhere")
    else:
        (folder.path / "checkpoint-9").write_text("")
    other(folder)
    make_checkpoint(folder.path / "checkpoint-1")
    folder.replace()
    assert {p.name for p in folder.path.iterdir()} == {"config.yaml", "checkpoint-1"}
    assert {p.name for p in elsewhere.iterdir()} == {*FILES, "manifest.json"}


@pytest.mark.parametrize("link", ["run", "parent"])
def test_a_linked_run_folder_is_replaced_where_it_is(tmp_path: Path, link: str) -> None:
    full_run(tmp_path / "real" / "run")
    place = tmp_path / "link"
    place.symlink_to(tmp_path / "real" / ("run" if link == "run" else ""))
    folder = RunFolder(place if link == "run" else place / "run")
    other(folder)
    make_checkpoint(folder.path / "checkpoint-1")
    folder.replace()
    assert place.is_symlink()
    assert not (tmp_path / "real" / "run" / "checkpoint-3").exists()


@pytest.mark.parametrize(
    "name", [".config.yaml.abc_1234", ".checkpoint-2.partial-0", ".adapter.partial-x1", "..lock.12345678"]
)
def test_what_a_killed_process_left_unpublished_takes_no_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if "partial" in name else (tmp_path / name).write_text("")
    RunFolder(tmp_path).check_free(overwrite=False)
    RunFolder(tmp_path).tidy()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".config.yaml.swp", ".git", ".env"])
def test_other_hidden_files_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    RunFolder(tmp_path).tidy()
    with pytest.raises(RunError, match="holds files that no run"):
        RunFolder(tmp_path).check_free(overwrite=True)
    assert (tmp_path / name).read_text() == "mine"
