"""How the answers of the demo of preferences are counted, for `evaluation.metrics`."""

from __future__ import annotations


def exact_record(answer: str, reference: str) -> bool:
    """Whether an answer's JSON record is the reference's, letter for letter, whatever the line above it says."""
    return answer.strip().split("\n")[-1] == reference.strip().split("\n")[-1]
