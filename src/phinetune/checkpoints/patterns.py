"""Makes sure that the regular expressions of an adapter come to an end, before PEFT matches them with every module.

Python's `re` tries one way after another. A short expression such as `(a|a)*b` can have more ways than there are
seconds in a lifetime, and a match can't be interrupted. So expressions are tried in a process of their own first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

SECONDS = 10.0  # for all expressions together; usual ones take milliseconds
# Names, whole or escaped: they are matched in one way, so they need no trial.
PLAIN = re.compile(r"\^?(?:\w|\\?[.-])*\$?")
TRIAL = """
import json, re, sys
job = json.load(sys.stdin)
for number, (how, text) in enumerate(job["expressions"]):
    print(number, flush=True)
    match = getattr(re.compile(text), how)
    for name in job["names"]:
        match(name)
"""


class _Expression(NamedTuple):
    """An expression as PEFT builds it from an entry.

    Attributes:
        place: the key, and the entry.
        how: the function of `re` that PEFT calls.
    """

    place: str
    how: str
    text: str


def why_no_end(peft: Mapping[str, Any], names: Iterable[str], seconds: float = SECONDS) -> list[str]:
    """What is wrong with the regular expressions of an adapter's configuration; empty if all of them can be matched.

    Args:
        peft: the keys of a `LoraConfig`.
        names: the modules' names, which PEFT matches the expressions with.
        seconds: how long all expressions together may take.
    """
    tried = [one for one in _expressions(peft) if not PLAIN.fullmatch(one.place.partition(": ")[2])]
    if not tried:
        return []
    job = {"expressions": [(one.how, one.text) for one in tried], "names": list(names)}
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        done = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        last = tried[int((error.stdout or b"0").split()[-1])]
        return [f"{_shown(last)} was not matched within {seconds:g} s; write it without repetitions in repetitions"]
    if not done.returncode:
        return []
    last = tried[int((done.stdout or b"0").split()[-1])]
    reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"status {done.returncode}"]
    return [f"{_shown(last)} is no regular expression: {reason[0][:200]}"]


def _shown(one: _Expression) -> str:
    key, _, entry = one.place.partition(": ")
    return f"{key}: `{entry if len(entry) <= 80 else f'{entry[:80]} …'}`"


def _expressions(peft: Mapping[str, Any]) -> Iterator[_Expression]:
    """All regular expressions of a configuration, as PEFT 0.21 builds them."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(peft.get(key), str):
            yield _Expression(f"{key}: {peft[key]}", "fullmatch", peft[key])
    for key in ("rank_pattern", "alpha_pattern"):
        for entry in peft.get(key) or {}:
            yield _Expression(f"{key}: {entry}", "match", rf"(.*\.)?({entry})$")
    for entry in peft.get("modules_to_save") or []:
        yield _Expression(f"modules_to_save: {entry}", "match", rf"(^|.*\.){entry}($|\..*)")
    layers = peft.get("layers_pattern") or []
    for entry in [layers] if isinstance(layers, str) else layers:
        yield _Expression(f"layers_pattern: {entry}", "match", rf"(?:^|.*?\.){entry}\.(?P<idx>\d+)\.")
