"""Cuts a text that is too long for one example into pieces."""

from __future__ import annotations

from phinetune.engine.examples import IGNORED, Encoded


def cut_into_pieces(text: Encoded, max_length: int, overlap: int) -> list[Encoded]:
    """The pieces of a text of which every token is trained on. In all of them together it is so once.

    A token is learnt from those before it. So each piece begins with the last `overlap` tokens of the one before, as
    context without loss.

    Args:
        max_length: tokens of a piece; only the last one may be shorter.
        overlap: at least 1, and less than `max_length`.
    """
    ids = text.input_ids
    pieces = []
    for start in range(0, len(ids) - overlap, max_length - overlap):
        piece = ids[start : start + max_length]
        context = overlap if start else 0
        pieces.append(Encoded(piece, [IGNORED] * context + piece[context:]))
    return pieces
