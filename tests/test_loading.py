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
            kept = [[] for _ in range(1000)]  # what a library makes
        count = gc.get_freeze_count()
        assert count > len(kept)
        with libraries():
            kept += [[] for _ in range(1000)]
        # No more than before. A few of what was left out may have been let go since.
        assert gc.get_freeze_count() <= count
    finally:
        gc.unfreeze()
