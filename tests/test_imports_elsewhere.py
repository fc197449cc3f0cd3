"""What benchmarks, tools, examples and documents import from the package is there, functions' own imports too."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def sources(file: Path) -> Iterator[str]:
    """The Python in a file: a module, the cells of a notebook, the code blocks of a document."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            if cell["cell_type"] == "code":
                yield "\n".join(
                    line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!"))
                )
    elif file.suffix == ".md":
        yield from re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    else:
        yield text


def imported(file: Path) -> set[tuple[str, str]]:
    """(module, name) of every import from the package."""
    found = set()
    for source in sources(file):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "phinetune":
                found |= {(str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "phinetune"}
    return found


FILES = [
    file
    for folder in ("benchmarks", "tools", "examples", "docs", ".")
    for pattern in ("*.py", "*.ipynb", "*.md")
    for file in sorted((ROOT / folder).glob(pattern))
    if imported(file)
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_name_that_is_imported_is_there(file: Path) -> None:
    missing = []
    for module, name in sorted(imported(file)):
        loaded = importlib.import_module(module)
        if name and not hasattr(loaded, name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{module}.{name}")
    assert missing == []


@pytest.mark.parametrize("file", ["benchmarks/fresh.py", "benchmarks/generate.py", "tools/make_demo_data.py"])
def test_the_demos_data_is_where_it_is_looked_for(file: str) -> None:
    (folder,) = set(re.findall(r'"phinetune" / "(\w+)"', (ROOT / file).read_text(encoding="utf-8")))
    assert (ROOT / "src" / "phinetune" / folder / "train.jsonl").is_file()
