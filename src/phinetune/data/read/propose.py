"""Proposes which column is what, from the names that people give their columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phinetune.config.row_forms import ROW_FORMS

# The names of each part, the likelier ones first. A part of a longer name counts, too: `customer_question`.
NAMES: Mapping[str, tuple[str, ...]] = {
    "assistant": (
        *("answer", "answers", "response", "responses", "completion", "output", "target", "reply", "tgt", "assistant"),
        *("gpt", "bot", "chosen", "generation", "solution", "sql", "cypher", "code", "translation", "translated"),
        *(
            "summary",
            "corrected",
            "correction",
            "edited",
            "after",
            "rewritten",
            "definition",
            "back",
            "label",
            "review",
        ),
        *("rewrite", "a", "y", "antwort", "reponse", "respuesta", "答案", "回答"),
    ),
    "user": (
        *("question", "questions", "prompt", "query", "instruction", "input", "source", "src", "user", "human"),
        *(
            "request",
            "utterance",
            "problem",
            "message",
            "original",
            "before",
            "draft",
            "phrase",
            "term",
            "front",
            "diff",
        ),
        *(
            "sentence",
            "document",
            "article",
            "comment",
            "text",
            "body",
            "content",
            "q",
            "x",
            "frage",
            "pregunta",
            "问题",
        ),
    ),
    "system": ("system", "system_prompt", "context", "schema", "background", "passage", "persona"),
    "tag": ("topic", "category", "task", "tag", "domain", "subject", "language", "lang", "type", "kind", "difficulty"),
}
ROLES_OF_A_PAIR = ("user", "assistant")
NAMES_IN_ORDER = ("user", "assistant", "system", "tag")
PLACEHOLDER = "YOUR_COLUMN"
NO_WORDS = ("true", "false", "yes", "no", "null", "on", "off", "y", "n")  # YAML takes them for something else


@dataclass
class Proposal:
    """What a file's columns may be.

    Attributes:
        names: of all columns.
        columns: the proposed `data.columns`; empty where the rows have a known form, or nothing can be proposed.
        prompt: a template in place of `columns["user"]`, where two columns make the question.
        guessed: whether the names say nothing, so that the first two columns with words were taken.
        form: the form that the rows have already.
    """

    names: Sequence[str]
    columns: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None
    guessed: bool = False
    form: str | None = None

    def knobs(self) -> dict[str, Any]:
        """The keys of the section `data` that say it."""
        prompt = {"prompt": self.prompt} if self.prompt else {}
        return {**prompt, **({"columns": self.columns} if self.columns else {})}

    def line(self) -> str:
        """These keys in one line of YAML, where one line holds them; nothing else."""
        lines = self.yaml()
        return lines[0].strip() if len(lines) == 1 else ""

    def yaml(self) -> list[str]:
        """These keys as lines of YAML below `data:`."""
        lines = [f"  prompt: {quoted(self.prompt)}"] if self.prompt else []
        listed = ", ".join(f"{key}: {quoted(name)}" for key, name in self.columns.items())
        return [*lines, *([f"  columns: {{{listed}}}"] if listed else [])]

    def advice(self, source: str) -> list[str]:
        """What to do about rows of no known form, in sentences."""
        lines = self.yaml() or [f"  columns: {{user: {PLACEHOLDER}, assistant: {PLACEHOLDER}}}"]
        how = (
            "say which column is what. The names tell nothing, so this is a guess"
            if self.guessed
            else "say which column is what"
            if not self.columns
            else "say which column is what, as the names suggest"
        )
        return [f"{how}; below `data:` write", *lines, f"`phinetune data columns {source}` shows rows read that way"]


def propose(rows: Sequence[Mapping[str, Any]]) -> Proposal:
    """What the columns of some rows may be.

    Args:
        rows: the first ones.
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    filled = [name for name in names if any(_has_words(row.get(name)) for row in rows)]
    made = Proposal(names, form=next((form.name for form in ROW_FORMS if form.fits(names)), None))
    if made.form:
        return made
    found: dict[str, str] = {}
    for part in ("assistant", "user", "system", "tag"):
        free = [name for name in filled if name not in found.values()]
        best = min(free, key=lambda name: _rank(name, NAMES[part]), default=None)
        if best is not None and _rank(best, NAMES[part]) < (9,):
            found[part] = best
    if len(filled) == 1:  # nothing asked and nothing answered: a text
        made.columns = {"text": filled[0]}
        return made
    if not set(ROLES_OF_A_PAIR) <= found.keys():
        found, made.guessed = _guess(filled, found), True
    made.columns = {part: found[part] for part in NAMES_IN_ORDER if part in found}
    _join_instruction(made, filled)
    return made


def _guess(filled: Sequence[str], found: Mapping[str, str]) -> dict[str, str]:
    """Question and answer from the columns with words, in their order; nothing where there are fewer than two."""
    free = [name for name in filled if name not in found.values()]
    pair = dict(found)
    for part in ROLES_OF_A_PAIR:
        if part not in pair and free:
            pair[part] = free.pop(0)
    return pair if set(ROLES_OF_A_PAIR) <= pair.keys() else {}


def _join_instruction(made: Proposal, filled: Sequence[str]) -> None:
    """A question of two columns, as with Alpaca's `instruction` and `input`, becomes a template."""
    by_name = {_normal(name): name for name in filled}
    if made.columns and {"instruction", "input"} <= by_name.keys() and by_name["input"] != made.columns["assistant"]:
        made.prompt = f"{{{by_name['instruction']}}}\n{{{by_name['input']}}}"
        del made.columns["user"]


def _rank(name: str, known: Sequence[str]) -> tuple[int, ...]:
    """How well a column's name fits: the whole of it first, then a part of it; (9,) for not at all."""
    normal = _normal(name)
    if normal in known:
        return (0, known.index(normal))
    parts = normal.split("_")
    places = [known.index(part) for part in parts if part in known and len(part) > 1]
    return (1, min(places)) if places else (9,)


def _normal(name: str) -> str:
    """A name in small letters, its words joined by one sign: `Customer Question` and `customerQuestion` are one."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[^\w]+", "_", apart).lower().strip("_")


def _has_words(value: Any) -> bool:
    return isinstance(value, str) and any(letter.isalpha() for letter in value)


def quoted(text: str | None) -> str:
    """A text as YAML has it within braces: bare if it is a word, else in quotation marks."""
    word = text or ""
    if re.fullmatch(r"[^\W\d][\w./-]*( [\w./-]+)*", word) and word.lower() not in NO_WORDS:
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'
