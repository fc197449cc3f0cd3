"""Large tensors made while a run trains share memory of their own: it is used again, does not grow, and goes back."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor

from phinetune.engine.kept_memory import kept_memory
from phinetune.engine.kernels.native.operator import has_library

CPU = torch.device("cpu")
MB = 1 << 20


@pytest.fixture(autouse=True)
def _memory() -> None:
    if sys.platform != "linux" or not has_library():
        pytest.skip("no native library, or not Linux")


@pytest.fixture
def keeps() -> Iterator[None]:
    with kept_memory(CPU) as on:
        assert on
        yield


def large(megabytes: float = 8, value: float = 1.0) -> Tensor:
    return torch.full((round(megabytes * MB / 4),), value)


def resident() -> float:
    """Megabytes of this process's memory."""
    return float(psutil.Process().memory_info().rss) / MB


@pytest.mark.usefixtures("keeps")
def test_what_is_let_go_is_used_again_whole_or_in_part() -> None:
    first, second = large(8), large(8, 2.0)
    place = first.data_ptr()
    del first
    smaller, rest = large(5), large(3)
    assert (smaller.data_ptr(), rest.data_ptr()) == (place, place + 5 * MB)
    del smaller, rest
    assert large(8).data_ptr() == place  # both parts make one block again
    assert torch.equal(second, large(8, 2.0))


@pytest.mark.usefixtures("keeps")
def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    held = [large(size) for size in (16, 1, 4, 1)]
    places = [tensor.data_ptr() for tensor in held]
    held[0] = held[2] = torch.empty(0)
    assert large(4).data_ptr() == places[2]


@pytest.mark.usefixtures("keeps")
def test_tensors_below_a_megabyte_come_out_of_the_heap() -> None:
    ours = large(8).data_ptr()
    small = torch.ones(1000)
    assert abs(small.data_ptr() - ours) > 1 << 30
    assert torch.equal(small, torch.ones(1000))


def test_tensors_outlive_it_and_later_ones_come_from_elsewhere() -> None:
    before = large(8, 3.0)
    with kept_memory(CPU):
        inside, gone = large(8, 4.0), large(8, 5.0)
        place = gone.data_ptr()
        del gone
    after = large(8, 6.0)
    assert after.data_ptr() != place
    for tensor, value in ((before, 3.0), (inside, 4.0), (after, 6.0)):
        assert torch.equal(tensor, large(8, value))
    with kept_memory(CPU):
        del before, after  # they came from C's heap, and go back there
        inside.resize_(4 * MB)  # a tensor may grow out of its block
        assert torch.equal(inside[: 2 * MB], large(8, 4.0))


def test_at_the_end_free_memory_goes_back_to_the_system() -> None:
    start = resident()
    with kept_memory(CPU):
        inside, gone = large(200), large(200)
        del gone
        assert resident() > start + 390
    assert resident() < start + 210
    del inside
    assert resident() < start + 10


def test_runs_may_overlap() -> None:
    with kept_memory(CPU):
        with kept_memory(CPU):
            place = large().data_ptr()
        assert large().data_ptr() == place
    assert large().data_ptr() != place


def test_another_device_changes_nothing() -> None:
    with kept_memory(torch.device("meta")) as on:
        assert not on
        with kept_memory(CPU):
            place = large().data_ptr()
        assert large().data_ptr() != place


@pytest.mark.usefixtures("keeps")
def test_memory_does_not_grow_where_steps_differ_in_length() -> None:
    """Each step keeps tensors from forward to backward beside some that it lets go; small ones outlive it."""
    draw, lasting, start, most = random.Random(0), [], resident(), 0.0
    for _ in range(12):
        length, kept = draw.uniform(0.9, 1.0), []
        for _ in range(20):
            passing = [large(4 * length), large(2 * length)]
            kept.append(large(3 * length))
            lasting.append(bytearray(1000))
            passing.append(large(5 * length))
            del passing
        while kept:
            beside = large(5 * length)
            kept.pop()
            del beside
        most = max(most, resident() - start)
    assert most < 1.15 * (20 * 3 + 4 + 2 + 5)


@pytest.mark.usefixtures("keeps")
def test_threads_get_blocks_of_their_own() -> None:
    wrong: list[float] = []

    def work(number: int) -> None:
        draw, held = random.Random(number), []
        for _ in range(150):
            held.append(large(draw.uniform(1, 3), float(number)))
            if len(held) > 5:
                tensor = held.pop(draw.randrange(5))
                wrong.extend(tensor[tensor != number].tolist())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("keeps")
def test_a_forked_process_has_its_own() -> None:
    shared = large(8, 1.0)
    if (child := os.fork()) == 0:
        shared.fill_(2.0)
        os._exit(0 if torch.equal(shared, torch.full_like(shared, 2.0)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(shared, torch.full_like(shared, 1.0))


@pytest.mark.usefixtures("keeps")
def test_more_than_the_machine_has_is_torchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 50)


def test_a_limit_of_the_address_space_leaves_it_alone() -> None:
    """The range of addresses would count."""
    code = (
        "import resource, torch\n"
        "from phinetune.engine.kept_memory import kept_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.RLIM_INFINITY))\n"
        "with kept_memory(torch.device('cpu')) as on: print(on, float(torch.ones(1 << 22).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(float(1 << 22))]
