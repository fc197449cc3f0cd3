"""The worked example runs as a reader would run it, and ends as it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lora_torch_only.py"


def test_it_imports_torch_and_phinetune_lora_alone() -> None:
    found: set[str] = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    outside = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside == {"torch", "torch.nn", "phinetune.lora"}


def test_it_runs_and_its_numbers_hold(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    *_, unload, layers, last = done.stdout.splitlines()
    assert unload == "6. Unload to plain torch"
    assert layers == "   layers: Conv2d, Conv2d, Linear, Linear"
    match = re.fullmatch(r"All as said: ([\d.]+)% before LoRA, ([\d.]+)% after, with (\d+)% of the weights", last)
    assert match, last
    before, after, part = map(float, match.groups())
    assert before < 50
    assert after > 90
    assert part == 13
    assert not list(tmp_path.iterdir())
