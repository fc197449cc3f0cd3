"""What the documents name is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from helpers import TINY
from phinetune import columns
from phinetune.api.columns import columns_of
from phinetune.config.run import make_config
from phinetune.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT, ROOT / "src" / "phinetune")


def named_paths(text: str) -> set[str]:
    """Files and folders between backquotes: a slash or an ending tells them from other words."""
    words = {word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    return {word for word in words if re.fullmatch(r"[\w./-]+(\.py|\.md|/)", word) and "<" not in word}


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    names = named_paths(text)
    assert len(names) > 5
    folders = [path for place in PLACES for path in [place, *place.rglob("*")] if path.is_dir()]
    assert [word for word in sorted(names) if not any((folder / word).exists() for folder in folders)] == []


def example_diffs() -> list[str]:
    return re.findall(r"(?ms)^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="git applies the diffs")
@pytest.mark.parametrize("number", range(4), ids=["form of rows", "metric", "export target", "objective"])
def test_the_worked_examples_apply_to_the_tree(number: int, tmp_path: Path) -> None:
    diffs = example_diffs()
    assert len(diffs) == 4
    (tmp_path / "example.diff").write_text(diffs[number], encoding="utf-8")
    command = ["git", "apply", "--check", str(tmp_path / "example.diff")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def data_blocks(language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"))


def test_the_page_on_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configurations are read, its templates and columns fit the files they speak of, and its Python trains."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qa.csv").write_text("question,answer,context,topic\nHow far?,Near.,Be brief.,roads\n")
    (tmp_path / "pairs.csv").write_text("lang,text,target\nGerman,Yes,Ja\n")
    for block in data_blocks("yaml"):
        section = make_config(yaml.safe_load(block)).data
        if Path(str(section.train)).is_file():
            assert [row.problem for row in columns_of(section, str(section.train)).shown] == [None]
    found = columns("qa.csv", out="run.yaml")
    assert "  " + data_blocks("yaml")[2].splitlines()[-1].strip() in found.config
    assert make_config(yaml.safe_load((tmp_path / "run.yaml").read_text())).data.tag == "topic"
    (block,) = data_blocks("python")
    exec(compile(block, "docs/data.md", "exec"), {"MODEL": TINY, "OUT": str(tmp_path / "run")})
    assert RunFolder(tmp_path / "run").is_finished


def test_the_order_of_the_rooms_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "src" / "phinetune").iterdir() if (path / "__init__.py").is_file()}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()
