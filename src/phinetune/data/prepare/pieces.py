"""Cuts a text that is too long for one example: into pieces, or its beginning off."""

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


def cut_beginning(text: Encoded, max_length: int) -> Encoded | None:
    """The end of a text of which answers are trained on. None if its last answer does not fit with a token before it.

    Args:
        max_length: tokens that are left.
    """
    start = len(text.input_ids) - max_length
    last = next((i for i in range(len(text.labels) - 1, -1, -1) if text.labels[i] != IGNORED), -1)
    while last > 0 and text.labels[last - 1] != IGNORED:
        last -= 1
    if last <= start:
        return None
    return Encoded(text.input_ids[start:], [IGNORED, *text.labels[start + 1 :]])
