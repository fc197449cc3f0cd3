"""The held-out loss and the answers of exported files, beside those of the run itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.generate import Answer, answer_prompts
from phinetune.engine.scoring import Score, score_rows
from phinetune.exporting.measuring.genai import Genai
from phinetune.exporting.measuring.llama_cpp import LlamaCpp
from phinetune.exporting.ollama.modelfile import WEIGHTS

ROWS = 24  # held-out rows that a file is measured on: llama.cpp takes a request a label
NEW_TOKENS = 64  # of an answer


@dataclass(frozen=True)
class Agreement:
    """How a file's greedy answers agree with the run's own.

    Attributes:
        answers: how many answers there are.
        same: how many of them have the same tokens.
        tokens: the share of tokens that come before the first difference, from 0 to 1.
    """

    answers: int
    same: int
    tokens: float


@dataclass(frozen=True)
class Measured:
    """What was measured of the run or of a file.

    Attributes:
        name: `the run`, or the file's name.
        loss: the mean negative log-likelihood of a label, in nats; None where the program does not tell it.
        agreement: None for the run itself, or without prompts.
    """

    name: str
    loss: float | None
    agreement: Agreement | None = None


def measure_run(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], prompts: Sequence[list[int]]
) -> tuple[Measured, list[Answer]]:
    """The run's own loss on `rows` and its greedy answers to `prompts`."""
    model.eval()
    total = sum(score_rows(model, rows), Score())
    answers = answer_prompts(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS) if prompts else []
    return Measured("the run", total.loss), answers


def measure_file(
    path: Path,
    rows: Sequence[Encoded],
    prompts: Sequence[list[int]],
    own: Sequence[Answer],
    on_done: Callable[[int], None] = lambda count: None,
) -> Measured:
    """The same of a GGUF file, of a folder for Ollama, or of an ONNX folder, which tells no loss.

    Args:
        own: the run's answers to `prompts`.
        on_done: called with the number of rows or answers that were just done.

    Raises:
        ModelError: the program that runs the file is not installed, or does not load it.
    """
    longest = max([len(row.input_ids) for row in rows] + [len(prompt) + NEW_TOKENS for prompt in prompts])
    program = _program(path, longest)
    try:
        loss = None
        if isinstance(program, LlamaCpp):
            nll = 0.0
            for row in rows:
                nll += program.nll(row)
                on_done(1)
            loss = nll / max(1, sum(label != IGNORED for row in rows for label in row.labels[1:]))
        answers = []
        for prompt in prompts:
            answers.append(program.answer(prompt, NEW_TOKENS))
            on_done(1)
    finally:
        program.close()
    return Measured(path.name, loss, agreement([one.ids for one in own], answers) if prompts else None)


def _program(path: Path, longest: int) -> LlamaCpp | Genai:
    if path.is_file():
        return LlamaCpp(path, longest)
    weights = path / WEIGHTS
    return LlamaCpp(weights, longest) if weights.is_file() else Genai(path)


def agreement(own: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> Agreement:
    """How two models' answers agree, token by token up to the first difference of each answer."""
    alike = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        for x, y in zip(own, theirs, strict=True)
    ]
    longest = [max(len(x), len(y)) for x, y in zip(own, theirs, strict=True)]
    same = sum(a == b for a, b in zip(alike, longest, strict=True))
    return Agreement(len(own), same, sum(alike) / max(1, sum(longest)) if sum(longest) else 1.0)
