"""What the pages say holds: links lead somewhere, commands and configurations are accepted, both languages agree."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import docs_pages
import phinetune
from docs_pages import DOCS, ROOT, Block, blocks, is_chinese, pages
from helpers import TINY
from phinetune.cli.app import app
from phinetune.config.run import RunConfig, load_config, make_config
from phinetune.data.read.messages import to_messages
from phinetune.data.read.preferences import read_preference
from phinetune.training.settings import read_settings

# Programs of others that a page may call. What they are given is theirs.
OTHERS = {
    *("pip", "python", "python3", "make", ".", "export", "echo", "accelerate", "torchrun", "llama-cli", "ollama"),
    *(
        "vllm",
        "llamafactory-cli",
        "git",
        "curl",
        "sbatch",
        "kubectl",
        "sky",
        "hf",
        "apt-get",
        "ssh",
        "mkdir",
        "sleep",
        "cat",
        "ls",
    ),
}
FOREIGN = ("# LLaMA-Factory",)  # the first line of a block that is another program's configuration
ENGLISH = [page for page in pages() if not is_chinese(page)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def in_site() -> set[str]:
    """The pages that mkdocs.yml names."""
    return set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    """A page that the site names need not be there yet: the site is not built without it."""
    lost = []
    for link in docs_pages.links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        awaited = target.is_relative_to(DOCS) and str(target.relative_to(DOCS)).replace(".zh.md", ".md") in in_site()
        if not target.exists() and not awaited:
            lost.append(link)
        if target.is_file() and anchor and anchor not in docs_pages.anchors(target):
            lost.append(link)
    assert lost == []


def test_every_page_is_in_the_site() -> None:
    found = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if not is_chinese(page)}
    assert found - in_site() == set()


@pytest.mark.parametrize("page", [page for page in ENGLISH if page not in docs_pages.FOR_PROGRAMS], ids=name)
def test_the_chinese_page_is_complete(page: Path) -> None:
    """The same headings and code blocks; and the same words in code, but for references, whose texts are generated."""
    english, chinese = (one.read_text(encoding="utf-8") for one in (page, docs_pages.chinese_of(page)))
    assert docs_pages.headings(chinese) == docs_pages.headings(english)
    assert docs_pages.commands(chinese) == docs_pages.commands(english)
    if page.parent.name != "reference":
        assert docs_pages.words_in_code(chinese) == docs_pages.words_in_code(english)


def accepted(words: list[str]) -> None:
    """Parse a command of phinetune as the program does, without running it."""
    command: Any = typer.main.get_command(app)
    if words == ["--help"]:  # prints at once
        return
    context = command.make_context("phinetune", words)
    while hasattr(command, "resolve_command"):  # a group of commands
        verb, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(verb, rest, parent=context)
    if context.params.get("overrides"):
        make_config({}, context.params["overrides"])
    if {"to", "kind"} <= context.params.keys():
        from phinetune.exporting.targets import check_kind

        for kind in (context.params["kind"] or "").split(","):
            check_kind(context.params["to"], kind or None)


def refusal(words: list[str], block: Block) -> list[str]:
    """Why the program does not take a command, with its place; empty if it does."""
    try:
        accepted(words)
    except Exception as error:  # of typer's own classes, or a ConfigError of what --set says
        return [f"{block.where}: phinetune {' '.join(words)}: {error}"]
    return []


@pytest.mark.parametrize("page", ENGLISH, ids=name)
def test_commands_are_accepted(page: Path) -> None:
    refused = []
    for block in blocks(page, "sh", "bash", "console"):
        for words in docs_pages.programs(block):
            program, given = words[0].rpartition("/")[2], words[1:]
            if "phinetune.cli.app" in words:  # behind a launcher
                program, given = "phinetune", words[words.index("phinetune.cli.app") + 1 :]
            if program in OTHERS:
                refused += [f"{block.where}: no extra {extra}" for extra in unknown_extras(words)]
            elif program != "phinetune":
                refused.append(f"{block.where}: what is {program}?")
            else:
                refused += refusal(given, block)
    assert refused == []


def unknown_extras(words: list[str]) -> list[str]:
    """Extras of phinetune that a line installs and pyproject.toml lacks."""
    lists = re.findall(r"phinetune\[([\w,]+)\]", " ".join(words))
    named = [extra for found in lists for extra in found.split(",")]
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return [extra for extra in named if not re.search(rf"(?m)^{extra} = \[", table)]


@pytest.mark.parametrize("page", ENGLISH, ids=name)
def test_configurations_are_accepted(page: Path) -> None:
    """Section by section, both dictionaries too; files and models need not be there."""
    for block in blocks(page, "yaml"):
        if not block.text.startswith(FOREIGN):
            assert_config(block)


def assert_config(block: Block) -> None:
    tree = yaml.safe_load(block.text)
    assert isinstance(tree, dict), f"{block.where}: no sections"
    assert tree.keys() <= RunConfig.model_fields.keys(), f"{block.where}: {tree.keys()}"
    made = make_config(tree, where=block.where)
    read_settings(made.peft_config, made.training_config)


@pytest.mark.parametrize("page", ENGLISH, ids=name)
def test_rows_are_read(page: Path) -> None:
    for block in blocks(page, "json", "jsonl"):
        for line in block.text.splitlines():
            row = json.loads(line)
            assert read_preference(row) if "chosen" in row else to_messages(row), block.where


@pytest.mark.parametrize("page", ENGLISH, ids=name)
def test_python_is_sound(page: Path) -> None:
    """It compiles; of phinetune it imports names that are there, and calls them with arguments that they have."""
    for block in blocks(page, "python"):
        tree = ast.parse(block.text, block.where)
        imported = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "phinetune"
            for alias in node.names
        }
        assert set(imported.values()) <= set(phinetune.__all__), block.where
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in imported:
                function = getattr(phinetune, imported[call.func.id])
                keywords = [keyword.arg for keyword in call.keywords if keyword.arg]
                assert set(keywords) <= set(inspect.signature(function).parameters), block.where


def said_by_the_program() -> list[str]:
    """All texts in the source, with … where a name or a number comes in."""
    texts: list[str] = []
    for file in (ROOT / "src" / "phinetune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sd]", "…", node.value))
    return texts


def test_messages_are_those_of_the_program() -> None:
    """What the page on trouble quotes in its first column is said somewhere in the source."""
    said = said_by_the_program()
    rows = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    quoted = [code for row in rows if row.startswith("| ") for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(quoted) > 60
    parts = [part.strip() for code in quoted for part in code.split("…")]
    assert [part for part in parts if not any(part in text for text in said)] == []


def test_the_tutorial_goes_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are made, its columns found, its configuration trains, and what is exported has the names it says."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "tutorial.md"
    (make_rows,) = blocks(page, "python")
    exec(compile(make_rows.text, make_rows.where, "exec"), {})
    found = phinetune.columns("rows.csv", out="proposed.yaml")
    assert found.rows == 128
    config = blocks(page, "yaml")[0].text
    (tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    proposed, written = (load_config(one).data for one in ("proposed.yaml", "run.yaml"))
    assert proposed.columns == written.columns
    assert proposed.train == written.train == "rows.csv"
    tree = yaml.safe_load(config)
    settings = {**tree["training_config"], "max_steps": 1, "use_cpu": True}
    short = {"max_new_tokens": 2, "max_prompts": 2}
    run = phinetune.train(TINY, tree["data"], training_config=settings, evaluation=short)
    lines = [words for block in blocks(page, "sh") for words in docs_pages.programs(block)]
    assert str(run.path) in {word for words in lines for word in words}
    assert (run.path / "report.html").is_file()
    for target, kind in (("ollama", None), ("gguf", "q8_0")):
        made = phinetune.export(run.path, target, kind=kind)
        for command in made.commands:
            assert any(" ".join(words).startswith(command) for words in lines), command
