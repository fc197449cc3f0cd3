"""Fuzzes one reader of strangers' files for some minutes, and writes down each input that does what it must not do.

    python tests/soak/fuzz.py data --minutes 10 [--found DIR] [--keep N]

The inputs begin with those in tests/soak/corpus and are changed by atheris (libFuzzer), which looks for those that
reach new code. One finding does not end the search: each is told once, by the place where it comes from.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import atheris
except ImportError:
    print("atheris is not installed, so nothing was fuzzed: pip install 'phinetune[fuzz]' (Linux, Python 3.11 to 3.13)")
    raise SystemExit(0) from None

with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["phinetune"]):
    from soak import fuzz_targets
    from soak.fuzz_targets import LONGEST, TARGETS, WORDS, problem_of, seeds


class Search:
    """The inputs of one search, what they found, and its end."""

    def __init__(self, target: str, minutes: float, found: Path, folder: Path, grown: Path, keep: int) -> None:
        self.target, self.found, self.folder, self.grown, self.keep = target, found, folder, grown, keep
        self.tried, self.findings = 0, set[str]()
        self.end = time.monotonic() + minutes * 60

    def one(self, given: bytes) -> None:
        """Try an input. The process ends here once the time is over, as libFuzzer would end it without a word."""
        if time.monotonic() > self.end:
            self._finish()
        if not given:
            return
        self.tried += 1
        problem = problem_of(self.target, given, self.folder)
        if problem is None:
            return
        kind = re.sub(r"\d+(\.\d+)?(?= s of| MiB)", "…", "\n".join(problem.splitlines()[-6:]))
        place = re.findall(r'File "[^"]*", line \d+', problem)
        kind = place[-1] + problem.rstrip().splitlines()[-1].split(":")[0] if place else kind
        if kind not in self.findings:
            self.findings.add(kind)
            self.found.mkdir(parents=True, exist_ok=True)
            file = self.found / f"{self.target}-{len(self.findings)}"
            file.write_bytes(given)
            print(f"{self.target}: {file}:\n{problem[-2500:]}", flush=True)

    def _finish(self) -> None:
        grown = sorted(self.grown.iterdir(), key=lambda file: file.stat().st_size)
        new = [file for file in grown if file.stat().st_size < 400]
        for file in new[:: max(1, len(new) // self.keep)][: self.keep] if self.keep else []:
            (fuzz_targets.CORPUS / self.target / file.name[:12]).write_bytes(file.read_bytes())
        done = f"{self.tried:,} inputs tried, {len(grown):,} reached new code, {len(self.findings)} findings"
        print(f"{self.target}: {done}")
        sys.stdout.flush()
        os._exit(bool(self.findings))


def main() -> None:
    """Search; exit status 1 if anything was found."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("target", choices=list(TARGETS))
    cli.add_argument("--minutes", type=float, default=10)
    cli.add_argument("--found", type=Path, default=Path("/tmp/phinetune-found"), help="where inputs are put")
    cli.add_argument("--keep", type=int, default=0, help="how many new inputs to add to the corpus")
    cli.add_argument("--seed", type=int, default=0, help="0: another one each time")
    given = cli.parse_args()
    with tempfile.TemporaryDirectory(prefix="phinetune-fuzz-") as place:
        folder, grown, words = (Path(place) / name for name in ("folder", "grown", "words"))
        folder.mkdir(), grown.mkdir()
        words.write_text("".join(f'"{_quoted(word)}"\n' for word in WORDS[given.target]))
        search = Search(given.target, given.minutes, given.found, folder, grown, given.keep)
        options = [
            f"-max_len={LONGEST}",
            f"-dict={words}",
            "-rss_limit_mb=8192",
            "-timeout=1200",
            f"-seed={given.seed}",
        ]
        options += ["-verbosity=0", "-print_final_stats=0"]
        old: list[Any] = [str(grown), str(seeds(given.target)[0].parent)]
        atheris.Setup([sys.argv[0], *options, *old], search.one)
        atheris.Fuzz()


def _quoted(word: str) -> str:
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in word.encode())


if __name__ == "__main__":
    main()
