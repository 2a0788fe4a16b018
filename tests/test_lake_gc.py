"""`atlas gc` with a lake: what goes from it, what stays, and that a step at work keeps its output."""

import hashlib
import time
from dataclasses import replace
from uuid import uuid4

import pytest

from atlas.db.engine import close_engines
from atlas.db.locks import locked
from atlas.db.runs import create_run
from atlas.pipeline import garbage_lake
from atlas.pipeline.garbage import collect
from atlas.settings import load_settings
from atlas.store.lake.lake import Lake
from tests.workers_plan import fake_plan, step


def output(word):
    return f"shard-{hashlib.sha256(word.encode()).hexdigest()[:16]}"


@pytest.fixture
def settings(tmp_path):
    given = {"ATLAS_HOME": str(tmp_path / "home"), "ATLAS_LAKE_URL": f"memory://{uuid4().hex}"}
    yield load_settings(given)
    close_engines()


@pytest.fixture
def lake(settings, tmp_path, monkeypatch):
    """Three outputs, one of them of a run and one with an SAE; two states, one of that run; a torn upload."""
    monkeypatch.setattr(garbage_lake, "LEAST_SECONDS", 0.0)
    lake = Lake(settings)
    plain, sae = tmp_path / "plain", tmp_path / "sae" / "00000"
    for folder in (plain, sae):
        folder.mkdir(parents=True)
    (plain / "part.bin").write_bytes(bytes(1000))
    (plain / "training.safetensors").write_bytes(bytes(10))
    (sae / "sae_weights.safetensors").write_bytes(bytes(10))
    for word in ("wanted", "unneeded"):
        lake.steps.publish(output(word), plain)
        lake.states.save(output(word), plain)
    lake.steps.publish(output("trained"), sae.parent)
    lake.remote.send({f"steps/{output('torn')}/dead/part.bin": plain / "part.bin"})
    time.sleep(0.01)
    return lake


def record_run(settings):
    digest = hashlib.sha256(b"wanted").hexdigest()
    create_run(settings, fake_plan([replace(step("wanted"), kind="shard", digest=digest)]), executor="local")


def freed(settings, **given):
    return sorted((one.what, one.name.removeprefix("steps/")) for one in collect(settings, **given))


def test_what_no_run_needs_goes(settings, lake):
    record_run(settings)
    going = sorted(
        [
            ("checkpoint", output("unneeded")),
            ("half-written upload", output("torn")),
            ("output", output("unneeded")),
        ]
    )
    assert freed(settings, grace=0, dry_run=True) == going
    assert freed(settings, grace=3600) == []
    assert freed(settings, grace=0) == going
    assert [e.name for e in lake.steps.entries()] == sorted([output("trained"), output("wanted")])
    assert [e.name for e in lake.states.entries()] == [output("wanted")]
    assert freed(settings, grace=0) == []


def test_a_database_that_knows_no_run_decides_nothing(settings, lake):
    assert freed(settings, grace=0) == [("half-written upload", output("torn"))]
    assert len(lake.steps.entries()) == 3


def test_an_output_that_is_being_made_stays(settings, lake):
    record_run(settings)
    with locked(settings, f"step {output('unneeded')}"):
        assert ("output", output("unneeded")) not in freed(settings, grace=0)
    assert ("output", output("unneeded")) in freed(settings, grace=0)
