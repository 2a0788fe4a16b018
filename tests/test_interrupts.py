"""Work that reports nothing is stopped all the same; what may pass is tried again; memory is made do with."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import pytest
import torch

from atlas.db.engine import UnreachableError
from atlas.errors import AtlasError, Cancelled, ConfigError, ConflictError
from atlas.lm.runtime import batch_of
from atlas.pipeline.interrupts import interruptible
from atlas.pipeline.memory import HALVINGS, within_memory
from atlas.pipeline.retries import MAX_ATTEMPTS, is_out_of_memory, judge
from atlas.pipeline.wiring import Step
from atlas.queue import BrokerError


def sleep():
    time.sleep(60)


def wait_for_a_thread():
    with ThreadPoolExecutor(1) as pool:
        over = threading.Event()
        try:
            pool.submit(over.wait, 60).result()
        finally:
            over.set()


def query():
    # One thread: another thread's piece of a cross product is waited for, however long it is.
    con = duckdb.connect(config={"threads": 1})
    con.execute("SELECT sum(sin(range)) FROM range(1000000000000)").fetchall()


def compute():
    x = 0
    while True:
        x += 1


def swallow_once():
    try:
        time.sleep(60)
    except Cancelled:
        time.sleep(0.01)
        raise RuntimeError("something else, made of the interruption") from None


@pytest.mark.parametrize("work", [sleep, wait_for_a_thread, query, compute, swallow_once])
def test_silent_work_is_stopped(work):
    wished = Cancelled("stop")
    with pytest.raises(Cancelled) as caught, interruptible(lambda: wished, patience=0.1):
        work()
    assert caught.value is wished


def test_work_that_hears_by_itself_is_left_alone():
    """Once it was told, it may take its time to save what it has."""
    asked, told, saved = threading.Event(), threading.Event(), []

    def wish():
        if asked.is_set():
            told.wait(60)
        asked.set()
        return None if told.is_set() else Cancelled("stop")

    def work():
        asked.wait(60)
        told.set()
        try:
            raise Cancelled("stop")
        finally:
            time.sleep(0.6)  # far beyond patience
            saved.append("checkpoint")

    with pytest.raises(Cancelled), interruptible(wish, patience=0.1):
        work()
    assert saved == ["checkpoint"]


def test_without_a_wish_nothing_happens_and_signals_are_as_before():
    before = signal.getsignal(signal.SIGUSR2)
    with interruptible(lambda: None, patience=0):
        time.sleep(0.3)
    assert signal.getsignal(signal.SIGUSR2) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "interrupts"]


def test_another_thread_has_to_notice_by_itself():
    def work():
        with interruptible(lambda: Cancelled("stop"), patience=0):
            time.sleep(0.3)
        return "done"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == "done"


def test_errors_of_the_work_pass():
    with pytest.raises(ConfigError, match="a bad value"), interruptible(lambda: None):
        raise ConfigError("a bad value")


@pytest.mark.parametrize(
    ("error", "attempt", "again", "counts"),
    [
        (UnreachableError("the database is away"), 1, True, True),
        (BrokerError("the broker is away"), MAX_ATTEMPTS - 1, True, True),
        (ConnectionResetError("reset"), MAX_ATTEMPTS, False, True),
        (ConflictError("held by process 12"), MAX_ATTEMPTS, True, False),
        (ConfigError("site 'w' is not known"), 1, False, True),
        (OSError(28, "No space left on device"), 1, False, True),
        (MemoryError(), 1, False, True),
    ],
)
def test_what_is_tried_again(error, attempt, again, counts):
    verdict = judge(error, attempt)
    assert (verdict.again, verdict.counts) == (again, counts)
    assert (verdict.wait > 0) == again


def test_a_transient_cause_and_what_it_says():
    error = AtlasError("corpus 'x' cannot be read")
    error.__cause__ = TimeoutError("no answer in 10 s")
    verdict = judge(error, 1)
    assert verdict.again
    assert "corpus 'x' cannot be read" in verdict.text
    assert "TimeoutError: no answer in 10 s" in verdict.text


def cpu_allocation():
    torch.empty(1 << 50, dtype=torch.uint8)


def numpy_allocation():
    np.empty(1 << 60, np.uint8)


@pytest.mark.parametrize("allocate", [cpu_allocation, numpy_allocation])
def test_real_allocations_that_fail_are_known(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def a_step(kind):
    return Step(kind, kind, "0" * 64, "gpu", ())


def test_batches_are_halved_until_they_fit():
    sizes = []

    def make():
        sizes.append(batch_of(16))
        if sizes[-1] > 2:
            raise MemoryError("too much")

    within_memory(make, a_step("shard"))
    assert sizes == [16, 8, 4, 2]
    assert batch_of(16) == 16


@pytest.mark.parametrize(("kind", "attempts"), [("shard", HALVINGS + 1), ("train", 1)])
def test_a_memory_that_never_suffices_is_said(kind, attempts):
    tried = []

    def make():
        tried.append(batch_of(1 << 10))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(
        AtlasError, match=f"step '{kind}' ran out of memory.*Tried to allocate 20 GiB.*allowed"
    ):
        within_memory(make, a_step(kind))
    assert len(tried) == attempts


def test_other_errors_are_not_tried_again():
    def make():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        within_memory(make, a_step("shard"))
