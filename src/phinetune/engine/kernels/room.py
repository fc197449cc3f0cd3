"""Matrices with room behind their rows, in which a second matrix comes to lie beside the first without a copy."""

from __future__ import annotations

from torch import Tensor


def empty(like: Tensor, rows: int, width: int, room: int) -> Tensor:
    """An uninitialised matrix, shape (rows, width), with `room` more elements behind each row.

    These are zeros: where a width is no multiple of a processor's tile, a product may read past the end of a row. It
    takes what is there times zero, which is not zero if it is not finite (seen with oneDNN on AMX, bfloat16).
    """
    if not room:
        return like.new_empty(rows, width)
    both = like.new_empty(rows, width + room)
    both[:, width:] = 0
    return both[:, :width]


def has(x: Tensor, room: int) -> bool:
    """Whether `x` has the form of what `empty` returns. Ask it only of what `empty` may have made."""
    rows, width = x.shape
    return room > 0 and x.stride() == (width + room, 1) and _elements(x) == rows * (width + room)


def widened(x: Tensor, room: int) -> Tensor:
    """A matrix that has room together with it: shape (rows, width + room)."""
    return x.as_strided((len(x), x.shape[1] + room), x.stride())


def beside(x: Tensor, more: Tensor, has_room: bool) -> Tensor:
    """`[x | more]` for matrices of as many rows.

    Args:
        has_room: x has room for `more`, which is written there. Else x is copied.
    """
    width, room = x.shape[1], more.shape[1]
    if has_room:
        both = widened(x, room)
    else:
        both = x.new_empty(len(x), width + room)
        both[:, :width] = x
    both[:, width:] = more
    return both


def _elements(x: Tensor) -> int:
    """How many elements x's memory has, from its beginning on; 0 if x does not begin there."""
    return 0 if x.storage_offset() else x.untyped_storage().nbytes() // x.element_size()
