"""Compiles the native kernels, once for each machine and torch, into phinetune's cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from phinetune.errors import reason_of
from phinetune.files import disk_trouble, staged_folder, write_text
from phinetune.home import cache_folder
from phinetune.waits import tell_wait

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
LIBRARY = "phinetune_kernels.so"
FAILED = "failed.txt"  # why an earlier build failed: it would fail again, and take its time again
COMPILERS = ("g++", "c++", "clang++")
LONGEST = 180.0  # seconds for the compiler; 5 to 10 are usual


class NotBuilt(Exception):
    """Why there is no library."""


def built(first_use: Callable[[Path], None]) -> Path:
    """The folder of the compiled library. If it is missing, it is made first; other processes wait for it.

    Args:
        first_use: called with a new folder before anyone else sees it. What it writes there stays.

    Raises:
        NotBuilt: there is no compiler, it failed now or before, or the cache folder can't be used.
    """
    target = cache_folder() / "kernels" / key()
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock"), timeout=2 * LONGEST):
                if not target.is_dir():
                    _make(target, first_use)
        return _vouched_for(target)
    except OSError as error:
        raise NotBuilt(f"{target.parent}: {disk_trouble(error) or reason_of(error)}") from error
    except Timeout as error:
        raise NotBuilt(f"another process holds {target.with_suffix('.lock')}") from error


def key() -> str:
    """Stands for all that decides what the library is: sources, torch, processor, C library, and the user.

    A library is made for the user who made it: loading it is running it.
    """
    parts = [file.read_bytes() for file in source_files()]
    facts = (torch.__version__, capability(), processor(), *platform.libc_ver(), str(os.getuid()))
    return hashlib.sha256(b"\0".join([*parts, *map(str.encode, facts)])).hexdigest()[:32]


def source_files() -> list[Path]:
    """The C++ sources, which the wheel holds."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))


def capability() -> str:
    """The instruction set that torch's own kernels use here, as torch names it: AVX512, AVX2, DEFAULT, …"""
    return torch.backends.cpu.get_cpu_capability()


def processor() -> str:
    """The processor's model and flags. The compiler is told to use what this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *dict.fromkeys(line for line in lines if line.startswith(wanted))])


def compiler() -> str:
    """The C++ compiler: `CXX`, as torch.compile takes it, else the first of `COMPILERS` on the PATH.

    Raises:
        NotBuilt: there is none.
    """
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if found is None:
        wanted = f"CXX={named}" if named else " or ".join(COMPILERS)
        raise NotBuilt(f"no C++ compiler: {wanted} is not on the PATH")
    return found


def command(compiler: str, out: Path) -> list[str]:
    """The call of the compiler. It makes code for this very processor, as `key` says."""
    root, kind = Path(torch.__file__).parent, capability()
    include = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
    narrower = ["-mno-avx512f"] if kind == "AVX2" else []  # torch may be told to keep below what there is
    return [
        compiler,
        *("-std=c++20", "-O3", "-march=native", *narrower, "-fPIC", "-shared", "-DNDEBUG"),
        *(f"-DCPU_CAPABILITY={kind}", f"-DCPU_CAPABILITY_{kind}"),
        *(f"-I{folder}" for folder in include),
        *(str(SOURCES / "ops.cpp"), "-o", str(out), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def _make(target: Path, first_use: Callable[[Path], None]) -> None:
    for remains in target.parent.glob(f".{target.name}.partial-*"):  # of a process that was killed
        shutil.rmtree(remains, ignore_errors=True)
    tool = compiler()
    tell_wait(logger, f"compiling the kernels for this processor with {tool}; once, about 10 s")
    with staged_folder(target) as stage:
        stage.chmod(0o755)
        reason = _compile(command(tool, stage / LIBRARY)) or _failure(first_use, stage)
        if reason:
            write_text(stage / FAILED, reason)


def _compile(call: list[str]) -> str | None:
    """Why the compiler failed; None if it did not."""
    try:
        done = subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return f"{call[0]} took longer than {LONGEST:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return f"{call[0]} failed: " + next((line for line in lines if "error" in line), lines[-1])


def _failure(first_use: Callable[[Path], None], stage: Path) -> str | None:
    """Why the new library can't be used; None if it can."""
    (stage / LIBRARY).chmod(0o755)
    try:
        first_use(stage)
    except (OSError, RuntimeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def _vouched_for(folder: Path) -> Path:
    """The folder itself, if it holds a library that nobody but this user or root can have written."""
    if (folder / FAILED).is_file():
        reason = (folder / FAILED).read_text(encoding="utf-8").strip()
        raise NotBuilt(f"{reason} (delete {folder} to try again)")
    for path in (folder, folder / LIBRARY):
        facts = path.stat()
        if facts.st_uid not in (os.getuid(), 0) or facts.st_mode & 0o022:
            raise NotBuilt(f"{path} can be written by others; delete it, and it is made again")
    return folder
