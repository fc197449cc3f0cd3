"""Each notebook runs whole, with fewer steps where it trains for minutes; its last cell checks its result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from notebooks import execute

from examples.example_helpers import EXAMPLES
from exporting.hub.hub_helpers import Hub

NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
# What the tests set in the cell tagged `parameters`; a notebook that isn't named runs as it stands.
SHORTER: dict[str, dict[str, Any]] = {
    "inference_and_finetuning.ipynb": {"STEPS": 8, "PROMPTS": 4},
    "lora_instructions.ipynb": {"STEPS": 8, "PROMPTS": 4, "REPO": "alice/shop-assistant"},
    "preference.ipynb": {"STEPS": 20, "PAIR_STEPS": 10, "PROMPTS": 8},
    "qlora.ipynb": {"STEPS": 8},
}


def printed(notebook: NotebookNode) -> list[str]:
    """The lines that the last cell printed."""
    return "".join(output.text for output in notebook.cells[-1].outputs if output.output_type == "stream").splitlines()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_whole_and_its_last_cell_finds_what_it_said(name: str, examples: Path, hub: Hub) -> None:
    notebook = execute(examples / name, SHORTER.get(name))
    assert re.match("All as said: ", printed(notebook)[-1])
    if "REPO" in SHORTER.get(name, {}):
        assert hub.repos["alice/shop-assistant"].files["README.md"].startswith(b"---")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_output_that_is_kept_is_that_of_a_whole_run(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert re.match("All as said: ", printed(notebook)[-1])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_output_that_is_kept_names_no_place_on_the_machine_that_made_it(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert not re.search(r"/(work|home|root|tmp/(?!…))/?\w", text)
    assert "\\u001b" not in text, "colours"
    assert "\\r" not in text, "bars that were redrawn"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_opens_with_what_it_shows_needs_and_takes(name: str) -> None:
    first = nbformat.read(EXAMPLES / name, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    for word in ("**Shows**", "**Needs**", "**Takes**"):
        assert word in first.source
