"""Twenty people annotate at once, each from a process of their own: nothing is lost, nobody sees an error."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
from benchmarks.annotators import measure
from tests.servers import database, empty_database, postgres_server

PEOPLE = 20


def test_twenty_annotators_at_once(database):
    found = measure(database, PEOPLE, seconds=2.5, pause=0.05)
    assert found.told.errors == []
    assert found.lost == 0
    assert found.told.unseen == 0, "a conflict that did not show both texts"
    assert found.told.conflicts > 0, "nobody met anybody: this run shows nothing"
    assert len({who for who, _ in found.told.saves}) == PEOPLE // 2 + PEOPLE // 4
