"""Rows are cut into runs of a size that the processor's cache holds."""

from __future__ import annotations

import pytest
import torch

from phinetune.engine.kernels.chunks import row_chunks


@pytest.mark.parametrize(
    ("shape", "most", "wanted"),
    [
        pytest.param((5, 6), 12, [(0, 2), (2, 4), (4, 5)], id="the last one smaller"),
        pytest.param((4, 2, 3), 12, [(0, 2), (2, 4)], id="three dimensions"),
        pytest.param((3, 6), 4, [(0, 1), (1, 2), (2, 3)], id="a row larger than a part"),
        pytest.param((3, 6), 100, [(0, 3)], id="all at once"),
        pytest.param((0, 6), 12, [], id="no rows"),
        pytest.param((3, 0), 12, [(0, 3)], id="rows of nothing"),
    ],
)
def test_every_row_is_in_one_part(
    shape: tuple[int, ...], most: int, wanted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.chunks.MAX_ELEMENTS", most)
    assert [(p.start, min(p.stop, shape[0])) for p in row_chunks(torch.empty(shape))] == wanted


def test_other_devices_take_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.chunks.MAX_ELEMENTS", 1)
    assert list(row_chunks(torch.empty(7, 3, device="meta"))) == [slice(0, 7)]
