"""What the page shows of a file, made in the process beside the server (`phinetune.serving.work`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.api.data import check_config, preview_config
from phinetune.config.run import RunConfig, make_config
from phinetune.data.preview import PreviewedRow, TokenText, Turn
from phinetune.serving.work import fold_system

PLACES = 5  # that are told of each kind of finding
PIECES = 400  # of a turn that are shown; the middle of a longer one is left out
LONGEST_PIECE = 200  # letters of a token; a text without spaces can be one


def whole_check(request: Mapping[str, Any]) -> dict[str, Any]:
    """All that `data check` says of a file.

    Args:
        request: the file's `path` and `form`, and the section `model` of the base.
    """
    path = Path(request["path"])
    found = check_config(_config(request), [str(path)]).report.to_dict()
    return {
        **{key: found[key] for key in ("rows", "kept", "cut", "dropped", "tokens", "trainable_tokens", "longest")},
        **{key: found[key] for key in ("turns", "rows_by_tokens", "languages", "sensitive", "checkpoint", "spoiled")},
        "unused": {**found["unused"], **found["unused_values"]},
        "findings": [{**one, "places": [_place(place, path) for place in one["places"][:PLACES]]}
                     for one in found["findings"]],
    }  # fmt: skip


def shown_rows(request: Mapping[str, Any]) -> dict[str, Any]:
    """Some rows of a file, token by token.

    Args:
        request: as for `whole_check`, with `first`, how many rows are left out before, and `count`.
    """
    rows = preview_config(_config(request), request["path"], int(request["count"]), int(request["first"]))
    return {"rows": [_row(one, Path(request["path"])) for one in rows]}


def _config(request: Mapping[str, Any]) -> RunConfig:
    kind = "dpo" if request["form"] == "preference" else "sft"
    config = make_config({"model": request["model"], "objective": {"kind": kind}})
    fold_system(config)
    return config


def _place(place: Mapping[str, str], path: Path) -> dict[str, Any]:
    return {"line": _line(place["where"]), "detail": _told(place["detail"], path)}


def _told(text: str, path: Path) -> str:
    """A text without the place of the file, which is nothing to a client."""
    return text.replace(f"{path}:", "line ").replace(str(path), "the file")


def _line(where: str) -> int | None:
    """The line of a place that is written as `file:line`."""
    number = where.rpartition(":")[2]
    return int(number) if number.isdecimal() else None


def _row(row: PreviewedRow, path: Path) -> dict[str, Any]:
    return {
        "line": _line(row.where),
        "tokens": row.tokens,
        "trainable_tokens": row.trainable,
        "cut": row.cut,
        "unused": list(row.unused),
        "problem": None if row.problem is None else _told(row.problem, path),
        "turns": [_turn(turn) for turn in row.turns],
    }


def _turn(turn: Turn) -> dict[str, Any]:
    pieces, more = list(turn.pieces), max(0, len(turn.pieces) - PIECES)
    half = PIECES // 2
    shown = [*pieces[:half], TokenText(f" … +{more:,} … ", False, False), *pieces[-half:]] if more else pieces
    return {"role": turn.role, "remark": turn.remark, "pieces": [_piece(one) for one in shown]}


def _piece(piece: TokenText) -> dict[str, Any]:
    text = piece.text if len(piece.text) <= LONGEST_PIECE else f"{piece.text[:LONGEST_PIECE]}…"
    return {"text": text, "special": piece.special, "trained": piece.trained}
