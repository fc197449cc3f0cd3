"""A layer's product and its low-rank update as one product, backwards too.

    [x | s·h] [W | B]ᵀ = x Wᵀ + s·h Bᵀ                [dy | dh] [W; A] = dy W + dh A

So the update is no second pass over the output. W, B and A lie in one matrix of shape (out + room, in + room):

    W   B
    A

B and A are copied there before each product, since training changes them, and since adapters may share a base. Sums are
float32 as in any product; the result is rounded once, where two passes round twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phinetune.engine.kernels import matmul, room
from phinetune.engine.kernels.matmul import BlockReader

_laid_out: set[int] = set()  # where the matrices begin that `make_room` made


def make_room(layer: nn.Linear, rank: int) -> None:
    """Lay a frozen weight out anew, with room for adapters of up to this rank. The layer computes what it did."""
    if layer.weight.requires_grad:
        raise ValueError("a weight that trains stays as it lies")
    if room_of(layer.weight) >= rank:
        return
    out, width = layer.weight.shape
    matrix = layer.weight.new_zeros(out + rank, width + rank)
    matrix[:out, :width] = layer.weight
    layer.weight.data = matrix[:out, :width]
    _laid_out.add(matrix.data_ptr())


def take_room(layer: nn.Linear) -> None:
    """Lay a weight out as any other."""
    if room_of(layer.weight):
        _laid_out.discard(layer.weight.data_ptr())
        layer.weight.data = layer.weight.detach().contiguous()


def room_of(weight: Tensor | BlockReader) -> int:
    """For how large a rank a weight of shape (out, in) has room; 0 if it lies in memory as any other."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.device.type != "cpu":
        return 0
    out, width = weight.shape
    found = weight.stride(0) - width
    if found <= 0 or weight.stride(1) != 1 or weight.storage_offset():
        return 0
    # Only now, since torch.compile can't trace these. Of a matrix that is gone the place may be another tensor's.
    if weight.data_ptr() not in _laid_out:
        return 0
    held = weight.untyped_storage().nbytes() // weight.element_size()
    return found if held == (out + found) * (width + found) else 0


def matrix_of(weight: Tensor | BlockReader, b: Tensor) -> Tensor | None:
    """The matrix that a weight lies in, with B written into it; None if there is no room for the adapter.

    Args:
        b: shape (out, r), in any dtype.
    """
    found, rank = room_of(weight), b.shape[1]
    if not isinstance(weight, Tensor) or rank > found:
        return None
    out, width = weight.shape
    # By `data`, for which torch counts no changes: a graph that has kept the weight may come to its backward later.
    matrix = weight.data.as_strided((out + found, width + found), weight.stride())
    matrix[:out, width : width + rank] = b.detach()
    return matrix


def forward(x: Tensor, hidden: Tensor, matrix: Tensor, out: int, has_room: bool) -> Tensor:
    """`x Wᵀ + s·h Bᵀ`, shape (rows, out).

    Args:
        hidden: s·h, shape (rows, r).
        has_room: x has room for h behind its rows.
    """
    both = room.beside(x, hidden, has_room)
    return _product(both, matrix[:out, : both.shape[1]].t())


def backward(grad: Tensor, d_hidden: Tensor, matrix: Tensor, a: Tensor, has_room: bool) -> Tensor:
    """`dy W + dh A`, shape (rows, in).

    Args:
        d_hidden: dh, shape (rows, r).
        has_room: dy has room for dh behind its rows.
    """
    out, (rank, width) = grad.shape[1], a.shape
    matrix[out : out + rank, :width] = a
    both = room.beside(grad, d_hidden, has_room)
    return _product(both, matrix[: out + rank, :width])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Their product, for some rows at a time, which a CPU multiplies faster."""
    made = left.new_empty(len(left), right.shape[1])
    for rows in matmul.rows_at_once(left):
        torch.mm(left[rows], right, out=made[rows])
    return made
