"""The reference of the command line, from its real parser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from doc_pages.filling import cell, table
from doc_pages.words import said
from phinetune.cli.app import app


def commands() -> Iterator[tuple[str, Any]]:
    """Each command by its words, `data check` for example, in the order of the help."""
    yield from _below(typer.main.get_command(app), "")


def _below(group: Any, words: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _below(command, f"{words}{name} ")
        else:
            yield f"{words}{name}", command


def cli_commands(language: str) -> str:
    """Every command: how it is called, what it does, its arguments and options."""
    return "\n\n".join(_command(words, command, language) for words, command in commands())


def _command(words: str, command: Any, language: str) -> str:
    shown = [one for one in command.params if one.name != "help"]
    arguments = [_metavar(one) for one in shown if one.param_type_name == "argument"]
    usage = " ".join(["phinetune", words, *arguments, *(["[OPTIONS]"] if len(arguments) < len(shown) else [])])
    parts = [f"## `{words}`", said(_help(command), language), f"```text\n{usage}\n```"]
    if shown:
        head = [said(word, language) for word in ("argument or option", "default", "what it does")]
        parts.append(table(head, [_row(one, language) for one in shown]))
    return "\n\n".join(parts)


def _help(command: Any) -> str:
    return " ".join((command.help or "").split())


def _row(one: Any, language: str) -> list[str]:
    return [_names(one), _default(one, language), cell(said(_told(one), language))]


def _told(one: Any) -> str:
    return " ".join((getattr(one, "help", None) or "").split())


def _names(one: Any) -> str:
    if one.param_type_name == "argument":
        return f"`{_metavar(one)}`"
    names = [*one.opts, *one.secondary_opts]
    value = "" if one.is_flag else f" {_metavar(one)}"
    return ", ".join(f"`{name}{value}`" for name in names)


def _metavar(one: Any) -> str:
    """What stands for the value: its own word, or that of its type. One that may be left out has brackets."""
    if one.param_type_name == "argument":
        word = one.metavar or one.name.upper()
        word = word.strip("[]")
        return word if one.required else f"[{word}]"
    kinds = {int: "N", float: "X", Path: "PATH"}
    return one.metavar or kinds.get(one.type_descriptor.annotation, "TEXT")


def _default(one: Any, language: str) -> str:
    if one.required:
        return said("must be given", language)
    value = one.default() if callable(one.default) else one.default
    if value in (None, [], (), False, ""):
        return "–"
    return f"`{str(value).lower() if value is True else value}`"
