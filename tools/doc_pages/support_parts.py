"""The support matrix: what the claims in tests/support_claims.yaml say, and whether their tests passed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from doc_pages.filling import DOCS, table
from doc_pages.words import said

CLAIMS = DOCS.parent / "tests" / "support_claims.yaml"
RECORD = Path(__file__).with_name("support.json")  # what ran, by device
MODELS = ("phi3", "llama", "mistral", "qwen2")
DEVICES = ("cpu", "cuda")


def claims() -> list[dict[str, Any]]:
    """Each claim: what can be done (`does`), with which model, by which test."""
    found: list[dict[str, Any]] = []
    for does, models in yaml.safe_load(CLAIMS.read_text(encoding="utf-8")).items():
        for model, tests in models.items():
            found += [{"does": does, "model": model, "test": test} for test in tests]
    return found


def recorded() -> dict[str, Any]:
    """What ran: by device, when, on what, and each test's outcome."""
    tree: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    return tree


def record(files: Sequence[Path]) -> None:
    """Take the files that `pytest --support-matrix FILE` wrote. A device replaces what was recorded of it."""
    tree = recorded()
    for file in files:
        tree |= json.loads(file.read_text(encoding="utf-8"))
    RECORD.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def outcome(claim: dict[str, Any], device: str) -> str | None:
    """passed, failed or skipped on a device; None if the claim's test did not run there."""
    found: str | None = recorded().get(device, {}).get("tests", {}).get(claim["test"])
    return found


def support_matrix(language: str) -> str:
    """A row for each thing that can be done, a column for each model and device; a number names the proving test."""
    made = claims()
    heads = [f"{model}, {device.upper()}" for device in DEVICES for model in MODELS if _any(made, model, device)]
    columns = [(model, device) for device in DEVICES for model in MODELS if _any(made, model, device)]
    rows = []
    for does in dict.fromkeys(claim["does"] for claim in made):
        cells = [_cell(made, does, model, device) for model, device in columns]
        rows.append([said(does, language), *cells])
    dates = [
        said("{device}: {date}, {machine}", language)
        .replace("{device}", device.upper())
        .replace("{date}", kept["date"])
        .replace("{machine}", kept["machine"])
        for device, kept in sorted(recorded().items())
    ]
    return "\n\n".join([table([said("what", language), *heads], rows), *(f"- {line}" for line in dates)])


def _any(made: Sequence[dict[str, Any]], model: str, device: str) -> bool:
    return any(claim["model"] == model and outcome(claim, device) for claim in made)


def _cell(made: Sequence[dict[str, Any]], does: str, model: str, device: str) -> str:
    """`✓` with the numbers of the tests that passed, `✗` with those that failed, `–` where nothing ran."""
    told = []
    for number, claim in enumerate(made, 1):
        if (claim["does"], claim["model"]) == (does, model):
            mark = {"passed": "✓", "failed": "✗"}.get(outcome(claim, device) or "")
            told += [f"{mark} [{number}](#proof-{number})"] if mark else []
    return ", ".join(told) or "–"


def support_tests(language: str) -> str:
    """The tests by their numbers."""
    head = [said(word, language) for word in ("number", "what", "model", "test")]
    rows = [
        [
            f'<span id="proof-{number}">{number}</span>',
            said(claim["does"], language),
            claim["model"],
            f"`{claim['test']}`",
        ]
        for number, claim in enumerate(claims(), 1)
    ]
    return table(head, rows, numbers=(0,))
