"""A check of a file by the byte tokenizer, and its findings as (kind, line)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.check.check import CheckReport, check_files
from phinetune.data.prepare.encode_rows import RowEncoder

ENCODER = make_encoder(byte_tokenizer(300))


def check(*files: Path, held_out: Path | None = None, max_length: int | None = None, **section: Any) -> CheckReport:
    others = [str(held_out)] if held_out else []
    return check_files([str(file) for file in files], others, RowEncoder(DataSection(**section), ENCODER, max_length))


def places(report: CheckReport, kind: str) -> list[str]:
    """Where findings of a kind stand, less the folder."""
    found = report.findings.by_kind.get(kind)
    return [place.where.rpartition("/")[2] for place in found.places] if found else []


def kinds(report: CheckReport) -> set[str]:
    return set(report.findings.by_kind)
