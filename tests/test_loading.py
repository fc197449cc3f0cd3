"""Libraries are loaded without the cycle collector, and it is as it was afterwards."""

from __future__ import annotations

import gc

import pytest

from phinetune.loading import libraries


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_afterwards(enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        frozen = gc.get_freeze_count()
        with libraries(stay=False):
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(ImportError), libraries(stay=False):
            raise ImportError
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable()


def test_what_was_loaded_is_left_out_of_collections_once() -> None:
    gc.unfreeze()
    try:
        with libraries():
            first = [[] for _ in range(10)]  # what a library makes
        assert gc.get_freeze_count() > len(first)
        with libraries():
            second = [[] for _ in range(10)]
        # Not counted: what was left out can be let go meanwhile.
        looked_at = {id(one) for one in gc.get_objects()}
        assert not looked_at & {id(one) for one in first}
        assert looked_at >= {id(one) for one in second}
    finally:
        gc.unfreeze()
