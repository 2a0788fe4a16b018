"""A named lock is one process's at a time, on SQLite and PostgreSQL, and ends with it."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from atlas.db.lock_models import NamedLock
from atlas.db.locks import drop_lock, locked, renew_lock, take_lock
from atlas.db.owner import new_owner
from atlas.db.session import reading
from atlas.errors import ConflictError
from tests.servers import database, empty_database, postgres_server, wait_until

ELSEWHERE = "elsewhere/1/0/abc"


def test_a_second_holder_is_refused_until_the_first_gives_it_back(database):
    with locked(database, "step x"), pytest.raises(ConflictError, match=r"step x is held by .* until .* UTC"):
        take_lock(database, "step x", ELSEWHERE)
    take_lock(database, "step x", ELSEWHERE)
    with pytest.raises(ConflictError, match=f"held by {ELSEWHERE}"), locked(database, "step x"):
        pytest.fail("two hold one lock")
    with locked(database, "step y"):
        pass


def test_a_lock_runs_out_unless_it_is_renewed(database):
    take_lock(database, "x", ELSEWHERE, seconds=0.3)
    assert renew_lock(database, "x", ELSEWHERE, seconds=-1.0)
    other = new_owner()
    take_lock(database, "x", other)
    assert not renew_lock(database, "x", ELSEWHERE)
    drop_lock(database, "x", ELSEWHERE)
    with pytest.raises(ConflictError):
        take_lock(database, "x", ELSEWHERE)


def test_a_holder_renews_its_lock_while_it_works(database):
    def until():
        with reading(database) as session:
            return session.get_one(NamedLock, "x").until

    with locked(database, "x", seconds=0.6):
        first = until()
        wait_until("the lock outlasts itself", lambda: until() > first + timedelta(seconds=0.6))
    with reading(database) as session:
        assert session.get(NamedLock, "x") is None


def test_a_dead_process_holds_nothing(database):
    script = "from atlas.db.owner import new_owner; print(new_owner())"
    dead = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    take_lock(database, "x", dead.stdout.strip())
    with locked(database, "x"):
        pass


def test_of_many_that_ask_at_once_one_gets_it(database):
    def ask(number):
        try:
            take_lock(database, "x", f"elsewhere/{number}/0/abc")
        except ConflictError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(16))) == 1
