"""Runs and leases: one claimer wins, abandoned work is taken over, every state follows the rules."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from atlas.cli.status import cancel, status
from atlas.db.engine import UnreachableError, close_engines
from atlas.db.leases import (
    LeaseLostError,
    cancel_step,
    claim_step,
    fail_step,
    finish_step,
    heartbeat,
    release_left_steps,
    request_cancel,
)
from atlas.db.owner import is_dead, new_owner
from atlas.db.progress import DbProgress, Rate
from atlas.db.runs import create_run, list_runs, load_run, plan_digest, ready_steps
from atlas.db.states import ENDED, RUN_MOVES, STEP_MOVES, check_move, run_status
from atlas.errors import Cancelled, ConfigError, ConflictError
from atlas.settings import load_settings
from tests.servers import database, empty_database, postgres_server, wait_until
from tests.workers_plan import diamond, fake_plan, step


@pytest.fixture
def sqlite(tmp_path):
    yield load_settings({"ATLAS_HOME": str(tmp_path / "sqlite")})
    close_engines()


def states(settings, run_id):
    return {s.name: s.status for s in load_run(settings, run_id).steps}


def do(settings, run_id, name):
    owner = new_owner()
    assert claim_step(settings, run_id, name, owner) is not None
    return finish_step(settings, run_id, name, owner)


def test_a_run_from_its_plan_to_its_end(database):
    run = create_run(database, fake_plan())
    assert (run.status, run.name, run.executor) == ("pending", "fake", "local")
    assert [(s.name, s.status, s.needs) for s in run.steps] == [
        ("a", "ready", ()),
        ("b", "pending", ("a",)),
        ("c", "pending", ("a",)),
        ("d", "pending", ("b", "c")),
    ]
    owner = new_owner()
    claimed = claim_step(database, run.id, "a", owner)
    assert (claimed.status, claimed.lease_owner, claimed.attempts) == ("running", owner, 1)
    assert load_run(database, run.id).status == "running"
    assert finish_step(database, run.id, "a", owner) == ("b", "c")
    assert do(database, run.id, "b") == ()
    assert do(database, run.id, "c") == ("d",)
    assert do(database, run.id, "d") == ()
    ended = load_run(database, run.id)
    assert ended.status == "done"
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert [r.id for r in list_runs(database)] == [run.id]


def test_current_steps_are_skipped(database):
    run = create_run(database, fake_plan(), current={"a", "b"})
    assert [s.status for s in run.steps] == ["skipped", "skipped", "ready", "pending"]
    everything = create_run(database, fake_plan(release="other"), current={"a", "b", "c", "d"})
    assert everything.id == run.id  # the same things are made: it is the same plan
    assert everything.status == "done"
    done = create_run(database, fake_plan([step("z")]), current={"z"})
    assert done.status == "done"


def test_the_same_plan_is_joined_until_it_ends(database):
    first = create_run(database, fake_plan([step("a")]))
    assert create_run(database, fake_plan([step("a")]), executor="queue").executor == "queue"
    do(database, first.id, "a")
    second = create_run(database, fake_plan([step("a")]))
    assert second.id != first.id
    assert [r.id for r in list_runs(database)] == [second.id, first.id]


def test_a_joined_run_learns_what_is_current(database):
    """The process died after its output was published and before the database heard of it."""
    run = create_run(database, fake_plan(), current=())
    claim_step(database, run.id, "a", dead_owner())
    joined = create_run(database, fake_plan(), current={"a"})
    assert joined.id == run.id
    assert [s.status for s in joined.steps] == ["skipped", "ready", "ready", "pending"]


def test_a_run_whose_outputs_were_removed_is_begun_anew(database):
    run = create_run(database, fake_plan(), current=())
    do(database, run.id, "a")
    assert create_run(database, fake_plan()).id == run.id
    assert create_run(database, fake_plan(), current={"a"}).id == run.id
    again = create_run(database, fake_plan(), current=())
    assert again.id != run.id
    assert again.steps[0].status == "ready"
    assert load_run(database, run.id).status == "cancelled"


def test_the_same_plan_asked_for_at_once_is_one_run(database):
    gate = threading.Barrier(6)

    def ask(_):
        gate.wait()
        return create_run(database, fake_plan()).id

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(ask, range(6)))) == 1


def test_of_eight_claimers_one_wins(database):
    run = create_run(database, fake_plan([step(f"s{i}") for i in range(5)]))
    for name in (s.name for s in run.steps):
        gate = threading.Barrier(8)

        def claim(_, name=name, gate=gate):
            gate.wait()
            return claim_step(database, run.id, name, new_owner())

        with ThreadPoolExecutor(8) as pool:
            won = [row for row in pool.map(claim, range(8)) if row]
        assert len(won) == 1
        assert load_run(database, run.id).steps[won[0].position].lease_owner == won[0].lease_owner


def test_an_expired_lease_is_taken_over_and_the_first_holder_hears_of_it(database):
    run = create_run(database, fake_plan())
    start = datetime.now(UTC)
    first, second = new_owner(), new_owner()
    assert claim_step(database, run.id, "a", first, seconds=60, now=start)
    assert claim_step(database, run.id, "a", second, now=start + timedelta(seconds=59)) is None
    heartbeat(database, run.id, "a", first, seconds=60, now=start + timedelta(seconds=50))
    assert claim_step(database, run.id, "a", second, now=start + timedelta(seconds=109)) is None
    taken = claim_step(database, run.id, "a", second, now=start + timedelta(seconds=111))
    assert (taken.lease_owner, taken.attempts) == (second, 2)
    for act in (
        lambda: heartbeat(database, run.id, "a", first),
        lambda: finish_step(database, run.id, "a", first),
        lambda: fail_step(database, run.id, "a", first, "late"),
        lambda: cancel_step(database, run.id, "a", first),
    ):
        with pytest.raises(LeaseLostError, match="no longer held by"):
            act()
    assert finish_step(database, run.id, "a", second) == ("b", "c")


def dead_owner():
    """The name of a process of this machine that has ended."""
    code = "from atlas.db.owner import new_owner; print(new_owner())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_dead_process_holds_nothing(database):
    owner = dead_owner()
    assert is_dead(owner)
    run = create_run(database, fake_plan())
    assert claim_step(database, run.id, "a", owner)
    assert claim_step(database, run.id, "a", new_owner()).attempts == 2
    other = create_run(database, fake_plan([step("x"), step("y", "x")]))
    assert claim_step(database, other.id, "x", owner)
    # Asking for the same plan again, as after kill -9, finds the step ready at once.
    assert [s.status for s in create_run(database, fake_plan([step("x"), step("y", "x")])).steps] == [
        "ready",
        "pending",
    ]


def test_owners_in_doubt_are_alive():
    assert not is_dead(new_owner())
    assert not is_dead("another-host/1/1/x")
    assert not is_dead("nonsense")
    host, pid, _, token = new_owner().split("/")
    assert is_dead(f"{host}/{pid}/1/{token}")  # the number was given to a younger process
    assert new_owner() != new_owner()


def test_a_failure_ends_what_needs_it_and_nothing_else(database):
    run = create_run(database, fake_plan())
    do(database, run.id, "a")
    owner = new_owner()
    claim_step(database, run.id, "b", owner)
    assert fail_step(database, run.id, "b", owner, "boom") == ()
    assert states(database, run.id) == {"a": "done", "b": "failed", "c": "ready", "d": "cancelled"}
    assert load_run(database, run.id).status == "running"
    do(database, run.id, "c")
    ended = load_run(database, run.id)
    assert (ended.status, ended.error) == ("failed", "b: boom")
    assert ended.steps[3].message == "needs b, which is failed"


def test_a_failure_to_be_tried_again(database):
    run = create_run(database, fake_plan([step("a")]))
    owner = new_owner()
    claim_step(database, run.id, "a", owner)
    assert fail_step(database, run.id, "a", owner, "away", retry=True) == ("a",)
    assert [(s.status, s.error) for s in ready_steps(database, run.id)] == [("ready", "away")]
    do(database, run.id, "a")
    assert load_run(database, run.id).status == "done"
    assert load_run(database, run.id).steps[0].error is None


def test_cancel(database):
    run = create_run(database, fake_plan())
    owner = new_owner()
    claim_step(database, run.id, "a", owner)
    request_cancel(database, run.id)
    assert states(database, run.id) == {"a": "running", "b": "cancelled", "c": "cancelled", "d": "cancelled"}
    assert heartbeat(database, run.id, "a", owner) is True
    with pytest.raises(ConflictError, match="still stopping"):
        create_run(database, fake_plan())
    cancel_step(database, run.id, "a", owner)
    assert load_run(database, run.id).status == "cancelled"
    with pytest.raises(ConflictError, match="is 'cancelled' already"):
        request_cancel(database, run.id)
    assert create_run(database, fake_plan()).id != run.id


def test_cancel_of_a_run_that_nobody_works_on(database):
    run = create_run(database, fake_plan())
    claim_step(database, run.id, "a", dead_owner())
    request_cancel(database, run.id)
    assert load_run(database, run.id).status == "cancelled"


def test_a_retry_of_a_run_to_be_stopped_is_cancelled(database):
    run = create_run(database, fake_plan([step("a")]))
    owner = new_owner()
    claim_step(database, run.id, "a", owner)
    request_cancel(database, run.id)
    assert fail_step(database, run.id, "a", owner, "away", retry=True) == ()
    assert load_run(database, run.id).status == "cancelled"


def test_a_step_of_a_cancelled_run_cannot_be_claimed(database):
    run = create_run(database, fake_plan([step("a"), step("b")]))
    owner = new_owner()
    claim_step(database, run.id, "a", owner)
    request_cancel(database, run.id)
    assert claim_step(database, run.id, "b", new_owner()) is None


def test_release_of_steps_whose_holder_is_gone(database):
    run = create_run(database, fake_plan([step("a"), step("b")]))
    claim_step(database, run.id, "a", dead_owner())
    claim_step(database, run.id, "b", new_owner())
    assert release_left_steps(database, run.id) == ("a",)
    assert states(database, run.id) == {"a": "ready", "b": "running"}
    later = datetime.now(UTC) + timedelta(minutes=2)
    assert release_left_steps(database, run.id, now=later) == ("b",)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("a", "b"), step("b")], "before or without what it needs"),
        ([step("a"), step("a")], "twice"),
        ([step("a", queue="tpu")], "queue 'tpu' is not known; allowed: cpu, gpu, io"),
    ],
)
def test_plans_that_make_no_sense(sqlite, steps, message):
    with pytest.raises(ConfigError, match=message):
        create_run(sqlite, fake_plan(steps))
    assert list_runs(sqlite) == []


def test_unknown_run_or_step(sqlite):
    run = create_run(sqlite, fake_plan())
    for act in (
        lambda: load_run(sqlite, "nope"),
        lambda: request_cancel(sqlite, "nope"),
        lambda: claim_step(sqlite, "nope", "a", new_owner()),
        lambda: claim_step(sqlite, run.id, "nope", new_owner()),
    ):
        with pytest.raises(ConfigError, match="'nope'"):
            act()


def test_plan_digest_names_what_is_made():
    plan = fake_plan()
    assert plan_digest(plan) == plan_digest(fake_plan(release="another"))
    assert plan_digest(plan) == plan_digest(fake_plan(tuple(reversed(plan.steps))))
    other = fake_plan((replace(plan.steps[0], digest="new"), *plan.steps[1:]))
    assert plan_digest(plan) != plan_digest(other)


# Progress


@pytest.fixture
def held(database):
    run = create_run(database, fake_plan())
    owner = new_owner()
    claim_step(database, run.id, "a", owner)
    return database, run.id, "a", owner


def test_progress_is_written_now_and_then(held, monkeypatch):
    monkeypatch.setattr(DbProgress, "_renew", lambda _: None)  # it writes by another clock
    settings, run_id, *_ = held
    now = [100.0]
    with DbProgress(*held, every=0.5, clock=lambda: now[0]) as progress:
        for done in range(1, 11):
            now[0] += 0.125
            progress.update(done, 10, f"block {done}")
            seen = load_run(settings, run_id).steps[0].done
            assert seen == done // 4 * 4
    row = load_run(settings, run_id).steps[0]
    assert (row.done, row.total, row.message) == (10, 10, "block 10")
    assert row.rate == pytest.approx(8)
    assert row.seconds_left == 0
    assert row.peak_rss_mb > 10


def test_progress_hears_of_cancel(held):
    settings, run_id, *_ = held
    with DbProgress(*held, every=0) as progress:
        progress.update(1, 10)
        request_cancel(settings, run_id)
        with pytest.raises(Cancelled, match="was asked to stop"):
            progress.update(2, 10)


def test_progress_hears_of_a_lost_lease(held):
    settings, run_id, name, _ = held
    late = datetime.now(UTC) + timedelta(hours=1)
    with DbProgress(*held, every=0) as progress:
        progress.update(1, 10)
        assert claim_step(settings, run_id, name, new_owner(), now=late)
        with pytest.raises(LeaseLostError):
            progress.update(2, 10)


def test_silence_is_not_death(held):
    settings, run_id, name, _ = held
    lasts = timedelta(seconds=0.8)

    def until():
        return load_run(settings, run_id).steps[0].lease_until

    taken = until()
    with DbProgress(*held, seconds=lasts.total_seconds()) as progress:
        progress.update(1, 10)
        wait_until("the thread renews the lease", lambda: until() != taken)
        first = until()
        wait_until("the lease outlasts itself", lambda: until() > first + lasts)
        held_until = until()
        assert claim_step(settings, run_id, name, new_owner(), now=held_until - lasts / 8) is None
    ended = until()
    time.sleep(0.4)  # two renewals' time
    assert until() == ended
    assert claim_step(settings, run_id, name, new_owner(), now=ended + lasts / 8)


def test_a_database_that_is_away_for_a_while(held, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(DbProgress, "_renew", lambda _: None)

    def away(*_, **__):
        raise UnreachableError("the server restarts")

    with DbProgress(*held, every=0, seconds=60, clock=lambda: now[0]) as progress:
        progress.update(1, 10)
        with monkeypatch.context() as patched:
            patched.setattr("atlas.db.progress.heartbeat", away)
            now[0] = 59.0
            progress.update(2, 10)
            now[0] = 61.0
            with pytest.raises(UnreachableError):
                progress.update(3, 10)
        progress.update(4, 10)
    assert load_run(held[0], held[1]).steps[0].done == 4


def test_rate_starts_anew():
    rate = Rate()
    assert rate.after(0, 0, 100) is None
    assert rate.after(10, 50, 100) == 5
    assert rate.after(11, 0, 100) is None  # a new phase of the same length
    assert rate.after(12, 2, 100) == 2
    assert rate.after(13, 3, 50) is None
    for second in range(14, 114):
        recent = rate.after(second, 3 + (second - 13) * (1 if second < 60 else 3), 1000)
    assert recent == pytest.approx(3, rel=0.05)


# States


@given(
    kind=st.sampled_from([STEP_MOVES, RUN_MOVES]),
    data=st.data(),
)
def test_only_listed_moves_are_allowed(kind, data):
    old, new = data.draw(st.sampled_from(sorted(kind))), data.draw(st.sampled_from(sorted(kind)))
    if new in kind[old]:
        check_move("x", old, new, kind)
    else:
        with pytest.raises(ConflictError, match=f"x is {old!r} and cannot become {new!r}"):
            check_move("x", old, new, kind)


def test_what_ended_stays_ended():
    for moves in (STEP_MOVES, RUN_MOVES):
        assert {state for state, after in moves.items() if not after} == ENDED & set(moves)
        assert all(set(after) <= set(moves) for after in moves.values())


@given(st.lists(st.sampled_from(sorted(STEP_MOVES)), min_size=1))
def test_a_run_ends_exactly_when_its_steps_have(steps):
    result = run_status(steps, "running")
    assert (result in ENDED) == all(s in ENDED for s in steps)
    assert (result == "failed") == (result in ENDED and "failed" in steps)
    assert (result == "done") == (set(steps) <= {"done", "skipped"})


class RunMachine(RuleBasedStateMachine):
    """Any order of claims, ends, deaths, cancels: beside a model that knows the plan and the rules only."""

    settings = None
    count = 0

    @initialize(needs=st.lists(st.sets(st.integers(0, 4), max_size=2), min_size=1, max_size=5))
    def begin(self, needs):
        RunMachine.count += 1
        steps = []
        for i, before in enumerate(needs):
            names = [f"s{j}" for j in sorted(before) if j < i]
            steps.append(replace(step(f"s{i}", *names), digest=f"{RunMachine.count}-{i}"))
        self.needs = {s.name: set(s.needs) for s in steps}
        self.run = create_run(self.settings, fake_plan(steps)).id
        self.holder = {}
        self.now = datetime.now(UTC)
        self.before = states(self.settings, self.run)
        self.stopping = False

    @rule(data=st.data())
    def claim(self, data):
        name = data.draw(st.sampled_from(sorted(self.needs)))
        owner = f"elsewhere/1/1/{data.draw(st.integers(0, 10**9))}"
        old = states(self.settings, self.run)[name]
        won = claim_step(self.settings, self.run, name, owner, now=self.now)
        assert (won is not None) == (old == "ready" and not self.stopping)
        if won:
            self.holder[name] = owner

    @rule(data=st.data(), how=st.sampled_from(["done", "fail", "retry", "cancel"]))
    def end(self, data, how):
        name = data.draw(st.sampled_from(sorted(self.needs)))
        owner = self.holder.get(name, "nobody/1/1/x")
        acts = {
            "done": lambda: finish_step(self.settings, self.run, name, owner),
            "fail": lambda: fail_step(self.settings, self.run, name, owner, "boom"),
            "retry": lambda: fail_step(self.settings, self.run, name, owner, "away", retry=True),
            "cancel": lambda: cancel_step(self.settings, self.run, name, owner),
        }
        if states(self.settings, self.run)[name] == "running":
            before = {n for n, s in states(self.settings, self.run).items() if s == "ready"}
            ready = acts[how]() or ()
            now_ready = {n for n, s in states(self.settings, self.run).items() if s == "ready"}
            assert set(ready) == now_ready - before
        else:
            with pytest.raises(LeaseLostError):
                acts[how]()

    @rule()
    def everybody_dies(self):
        self.now += timedelta(hours=1)
        release_left_steps(self.settings, self.run, now=self.now)
        assert "running" not in states(self.settings, self.run).values()

    @rule()
    def stop(self):
        if load_run(self.settings, self.run).ended:
            with pytest.raises(ConflictError):
                request_cancel(self.settings, self.run)
        else:
            request_cancel(self.settings, self.run)
            self.stopping = True

    @invariant()
    def states_follow_the_rules(self):
        if not hasattr(self, "run"):
            return
        row = load_run(self.settings, self.run)
        now = {s.name: s.status for s in row.steps}
        for s in row.steps:
            assert (s.status == "running") == (s.lease_owner is not None)
            finished = all(now[n] in ("done", "skipped") for n in s.needs)
            if s.status in ("ready", "running", "done", "failed"):
                assert finished, f"{s.name} is {s.status} before what it needs"
            if s.status == "pending":
                assert not finished, f"{s.name} waits for nothing"
            if self.before[s.name] in ENDED:
                assert s.status == self.before[s.name], "what ended changed"
        assert row.ended == all(state in ENDED for state in now.values())
        assert row.ended == (row.finished_at is not None)
        self.before = now


def test_state_machine(sqlite):
    RunMachine.settings = sqlite
    bounds = hypothesis_settings(
        max_examples=25,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    run_state_machine_as_test(RunMachine, settings=bounds)


# Commands


def test_status_and_cancel_commands(sqlite):
    environment = {"ATLAS_HOME": str(sqlite.home), "COLUMNS": "200"}
    environment["ATLAS_DATABASE_URL"] = sqlite.database_url

    def said(command, *arguments):
        result = CliRunner().invoke(command, arguments, env=environment, catch_exceptions=False)
        return result.output

    assert "no runs yet" in said(status)
    run = create_run(sqlite, fake_plan(diamond()))
    owner = new_owner()
    claim_step(sqlite, run.id, "a", owner)
    heartbeat(sqlite, run.id, "a", owner, done=25, total=100, message="layer 3", rate=5.0, peak_rss_mb=812.4)
    assert run.id in said(status)
    text = said(status, run.id)
    for part in ("running", "25%", "5/s", "15s", "812", "layer 3", "0/4 steps"):
        assert part in text, part
    assert "is stopping: a" in said(cancel, run.id)
    assert "stopping" in said(status, run.id)
    cancel_step(sqlite, run.id, "a", owner)
    assert "cancelled" in said(status, run.id, "--watch")
