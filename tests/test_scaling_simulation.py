"""The simulation of many workers keeps to what scheduling theory says, and to small cases done by hand."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from atlas.pipeline.plan import Step
from benchmarks.simulation import MODELS, Rates, costs, schedule, seconds, simulate


def step(name, *needs, queue="gpu"):
    return Step(name, name.rstrip("0123456789"), name, queue, needs)


def test_by_hand():
    """a (2 s), then b and c (3 s each), then d (1 s) on the one worker for io."""
    steps = [
        (step("a"), 2.0),
        (step("b", "a"), 3.0),
        (step("c", "a"), 3.0),
        (step("d", "b", "c", queue="io"), 1.0),
    ]
    one = schedule(steps, {"gpu": 1, "io": 1})
    assert one.makespan == 9
    assert one.path == {"a": 2, "b": 3, "c": 3, "d": 1}, "c waited for the worker of b"
    assert one.gpu_share == pytest.approx(8 / 9)
    two = schedule(steps, {"gpu": 2, "io": 1})
    assert two.makespan == 6
    assert sum(two.path.values()) == 6
    assert two.busy == {"a": 2, "b": 3, "c": 3, "d": 1}
    assert schedule(steps, {"any": 1}).makespan == 9


@st.composite
def plans(draw):
    n = draw(st.integers(1, 12))
    found = []
    for i in range(n):
        needs = [f"s{j}" for j in draw(st.sets(st.integers(0, i - 1), max_size=3))] if i else []
        found.append((step(f"s{i}", *needs), float(draw(st.integers(1, 9)))))
    return found


def longest(steps):
    ends = {}
    for one, spent in steps:
        ends[one.name] = spent + max((ends[need] for need in one.needs), default=0.0)
    return max(ends.values())


@given(plans(), st.integers(1, 5))
@hypothesis_settings(deadline=None, max_examples=60)
def test_grahams_bounds(steps, n):
    """Between what no schedule can beat and (2 - 1/n) times that (Graham 1969)."""
    found = schedule(steps, {"any": n})
    work = sum(spent for _, spent in steps)
    best = max(longest(steps), work / n)
    assert best - 1e-9 <= found.makespan <= work / n + (1 - 1 / n) * longest(steps) + 1e-9
    assert sum(found.path.values()) == pytest.approx(found.makespan), "the path that decides has no gaps"
    if n == 1:
        assert found.makespan == work


def test_a_part_repeats_the_forward_pass():
    """Why training stops to scale: the last of twelve parts costs far more than a twelfth."""
    rates = Rates()
    whole_plan, whole = costs("gpt2-small", 1)
    plan, cost = costs("gpt2-small", 12)
    parts = [seconds(plan, s, cost[s.name], rates) for s in plan.of_kind("train")]
    (alone,) = [seconds(whole_plan, s, whole[s.name], rates) for s in whole_plan.of_kind("train")]
    assert len(parts) == 12
    assert parts == sorted(parts), "a later layer needs more of the model"
    assert alone < sum(parts)
    assert max(parts) > 3 * alone / 12


def test_more_gpus_are_never_slower_and_less_efficient():
    times = [simulate("gpt2-small", n, Rates()).makespan for n in (1, 4, 16)]
    assert times == sorted(times, reverse=True)
    assert set(MODELS) == {"gpt2-small", "pythia-160m", "pythia-1.4b", "7b"}
