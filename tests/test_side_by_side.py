"""Work that falls into parts: in order, not far ahead of who reads it, stopped where one part fails."""

import threading
import time
from functools import partial

import pytest
import torch

from atlas.lm.runtime import in_lanes, lanes
from atlas.pipeline.inputs import side_by_side


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def slow_first(n: int) -> int:
    time.sleep(0.02 if n == 0 else 0)
    return n


def test_results_come_in_order_and_every_lane_has_one_thread():
    with side_by_side([partial(slow_first, n) for n in range(20)]) as results:
        assert list(results) == list(range(20))
    assert set(in_lanes(lambda _: torch.get_num_threads(), range(9), torch.device("cpu"))) == {1}
    assert torch.get_num_threads() == 2


def test_jobs_begin_before_anybody_reads_and_no_more_than_are_needed():
    begun: list[int] = []
    with side_by_side([partial(begun.append, n) for n in range(50)]) as results:
        deadline = time.monotonic() + 60
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(begun) == [0, 1, 2]
        next(results)
        assert len(list(results)) == 49


@pytest.mark.parametrize("fails", ["job", "block"])
def test_what_has_not_begun_is_forgotten_when_something_fails(fails):
    begun: list[int] = []
    over, before = threading.Event(), set(threading.enumerate())

    def job(n: int) -> None:
        begun.append(n)
        if fails == "job" and n == 0:
            raise ValueError("no")
        over.wait(300)

    def work() -> None:
        with lanes() as pool:
            waiting = [pool.submit(job, n) for n in range(50)]
            waiting[-1].add_done_callback(lambda _: over.set())  # it is forgotten
            if fails == "block":
                raise ValueError("no")
            waiting[0].result()

    with pytest.raises(ValueError, match="no"):
        work()
    assert len(begun) <= 3
    assert torch.get_num_threads() == 2
    left = set(threading.enumerate()) - before
    assert not [t for t in left if t.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("after", [0, 2, 10])
def test_jobs_may_be_found_while_others_have_begun(after):
    """A generator that fails, at once or later, fails the block; what has begun is waited for, no more."""
    begun: list[int] = []
    ended: list[int] = []

    def job(n: int) -> int:
        begun.append(n)
        time.sleep(0.01)
        ended.append(n)
        return n

    def jobs():
        for n in range(after):
            yield partial(job, n)
        raise ValueError("no")

    def work() -> None:
        with side_by_side(jobs()) as results:
            list(results)

    with pytest.raises(ValueError, match="no"):
        work()
    assert sorted(ended) == sorted(begun) == list(range(len(begun)))
    assert after - 3 <= len(begun) <= after
    assert torch.get_num_threads() == 2
