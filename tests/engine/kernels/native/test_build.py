"""The library is compiled once for all processes; without a compiler, torch's own operators do the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from phinetune.engine.kernels.native import build
from phinetune.engine.kernels.native.operator import TRIALS, UNABLE, chosen


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def compiler_that(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line to `calls` and then does something to its output, `$out`. Returns `calls`."""
    calls, tool = folder / "calls", folder / "tool"
    tool.write_text(
        f'#!/bin/sh\necho x >> {calls}\nwhile [ "$1" != -o ]; do shift; done; out="$2"\n{does}\n', encoding="utf-8"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tool))
    return calls


def nothing(folder: Path) -> None:
    """What is done on the first use of a library, for tests that load none."""


NORM = """
    import logging, torch
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from phinetune.engine.kernels.norm import rms_norm
    x = torch.ones(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-5).sum().backward()
    rms_norm(x, torch.ones(4), 1e-5)
    print(x.grad.shape, torch.ops.loaded_libraries)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=given, capture_output=True, text=True, check=True
    )


def test_without_a_compiler_torchs_operators_run_and_one_line_says_why(home: Path) -> None:
    done = run(NORM, PATH="", CXX="")
    assert done.stdout.strip() == "torch.Size([2, 4]) set()"
    (line,) = done.stderr.splitlines()
    assert line == (
        "WARNING kernels run as torch's operators, which take longer: "
        "no C++ compiler: g++ or c++ or clang++ is not on the PATH"
    )
    assert not list((home / "kernels").glob("*/"))


@pytest.mark.skipif(not chosen(), reason="no native kernels on this machine: the log says why")
def test_a_new_home_gets_a_library_with_its_trials_and_says_so_once(home: Path) -> None:
    done = run(NORM)
    (folder,) = (path for path in (home / "kernels").iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {build.LIBRARY, TRIALS}
    line, *others = done.stderr.splitlines()
    assert line.startswith("INFO compiling the kernels for this processor with ")
    # On a busy machine an operator may lose its trial, which is said as well.
    trials = json.loads((folder / TRIALS).read_text())
    lost = [name for name, found in trials.items() if not found["native_is_faster"] and found != UNABLE]
    assert [other.split(" is left aside: ")[0] for other in others] == [
        f"WARNING the native form of {name}" for name in lost
    ]
    assert build.LIBRARY in done.stdout
    assert run(NORM, PATH="", CXX="").stderr == ""


def test_many_processes_compile_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiler_that("sleep 0.5; echo > $out", tmp_path, monkeypatch)
    code = "from phinetune.engine.kernels.native import build; print(build.built(lambda folder: None))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in started}
    assert folders == {str(home / "kernels" / build.key())}
    assert calls.read_text().count("x") == 1


def test_a_compiler_that_fails_is_asked_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiler_that('echo "a.h:1: error: no such thing" >&2; echo hint >&2; exit 1', tmp_path, monkeypatch)
    for _ in range(2):
        with pytest.raises(build.NotBuilt) as caught:
            build.built(nothing)
        target = home / "kernels" / build.key()
        assert str(caught.value) == (
            f"{tmp_path / 'tool'} failed: a.h:1: error: no such thing (delete {target} to try again)"
        )
    assert calls.read_text().count("x") == 1
    shutil.rmtree(target)
    with pytest.raises(build.NotBuilt):
        build.built(nothing)
    assert calls.read_text().count("x") == 2


def test_a_compiler_that_never_ends_is_ended(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler_that("exec sleep 600", tmp_path, monkeypatch)
    monkeypatch.setattr(build, "LONGEST", 0.5)
    with pytest.raises(build.NotBuilt, match="took longer than"):
        build.built(nothing)


def test_a_library_that_can_not_be_used_is_not_tried_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler_that("echo > $out", tmp_path, monkeypatch)

    def refuses(folder: Path) -> None:
        assert (folder / build.LIBRARY).read_bytes() == b"\n"
        raise OSError("invalid ELF header")

    for _ in range(2):
        with pytest.raises(build.NotBuilt, match="invalid ELF header"):
            build.built(refuses)
    assert calls.read_text().count("x") == 1


def test_a_library_that_others_can_write_is_not_loaded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that("echo > $out", tmp_path, monkeypatch)
    folder = build.built(nothing)
    for path in (folder, folder / build.LIBRARY):
        assert path.stat().st_mode & 0o777 == 0o755
        path.chmod(0o777)
        with pytest.raises(build.NotBuilt, match="can be written by others"):
            build.built(nothing)
        path.chmod(0o755)


def test_a_home_that_can_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.NotBuilt, match="file/kernels"):
        build.built(nothing)


def test_what_decides_the_library_decides_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [build.key()]
    for name, value in (
        ("processor", lambda: "another"),
        ("capability", lambda: "another, too"),
        ("source_files", list),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            keys.append(build.key())
    monkeypatch.setattr("torch.__version__", "9.9")
    assert len({*keys, build.key()}) == 5


def test_cxx_names_the_compiler_and_one_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")
    assert build.compiler() == shutil.which("sh")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.NotBuilt, match="CXX=no-such-compiler is not on the PATH"):
        build.compiler()
