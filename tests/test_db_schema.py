# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
"""Migrations lead to the declared tables, forward and back, on both databases."""

import multiprocessing
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import CheckConstraint, inspect, text

from atlas.db import review_models as _review_models
from atlas.db import schema
from atlas.db.annotations import load_head, save_head
from atlas.db.engine import UnreachableError, _make_engine, close_engines, engine_for, parse_url
from atlas.db.models import Base
from atlas.db.notes import HeadAnnotation
from atlas.db.runs import create_run, load_run
from atlas.errors import AtlasError, ConfigError, DatabaseError
from atlas.settings import load_settings
from tests.servers import database, empty_database, postgres_server
from tests.workers_plan import fake_plan

NEWEST = schema.newest_revision()
ANNOTATIONS = {"head_annotations", "feature_annotations", "annotation_history"}


def tables(settings):
    return set(inspect(engine_for(settings.database_url)).get_table_names())


def test_up_down_up(empty_database):
    declared = set(Base.metadata.tables)
    assert schema.current_revision(empty_database) is None
    assert schema.upgrade(empty_database) == NEWEST
    assert tables(empty_database) == declared | {"alembic_version"}
    assert schema.downgrade(empty_database, "0001") == "0001"
    assert tables(empty_database) == ANNOTATIONS | {"alembic_version"}
    assert schema.downgrade(empty_database, "base") == "base"
    assert tables(empty_database) == {"alembic_version"}
    assert schema.upgrade(empty_database) == NEWEST
    assert schema.check(empty_database) == NEWEST


def test_migrated_schema_is_the_declared_one(database):
    assert schema.differences(database) == []
    found = inspect(engine_for(database.database_url))
    for name, table in Base.metadata.tables.items():
        columns = {c["name"]: c["nullable"] for c in found.get_columns(name)}
        assert columns == {c.name: c.nullable for c in table.columns}, name
        checks = {c["name"] for c in found.get_check_constraints(name)}
        declared = {c.name for c in table.constraints if isinstance(c, CheckConstraint)}
        assert checks == declared, name


def test_a_difference_is_seen(database):
    with engine_for(database.database_url).begin() as connection:
        connection.execute(text("ALTER TABLE runs ADD COLUMN surplus INTEGER"))
    assert "surplus" in schema.differences(database)[0]


def test_downgrade_of_runs_keeps_annotations(database):
    save_head(database, HeadAnnotation("m", 0, 1, "me", label="kept"), 0)
    schema.downgrade(database, "0001")
    schema.upgrade(database)
    found = load_head(database, "m", 0, 1, "me")
    assert found is not None
    assert found.label == "kept"


def test_downgrade_of_users_keeps_runs(database):
    run = create_run(database, fake_plan())
    assert load_run(database, run.id).started_by
    schema.downgrade(database, "0002")
    schema.upgrade(database)
    found = load_run(database, run.id)
    assert (found.id, found.status, found.started_by) == (run.id, run.status, None)
    assert [s.name for s in found.steps] == [s.name for s in run.steps]


def test_server_is_never_changed_unasked(postgres_server, tmp_path):
    settings = replace(load_settings({"ATLAS_HOME": str(tmp_path)}), database_url=postgres_server.database())
    with pytest.raises(DatabaseError, match="run: atlas db upgrade") as caught:
        load_head(settings, "m", 0, 0, "me")
    assert "not-shown" not in str(caught.value)
    assert tables(settings) == set()
    schema.upgrade(settings)
    assert load_head(settings, "m", 0, 0, "me") is None
    close_engines()


def test_embedded_database_is_made_when_first_used(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path / "not" / "yet")})
    assert load_head(settings, "m", 0, 0, "me") is None
    assert schema.check(settings) == NEWEST
    with engine_for(settings.database_url).connect() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(text("PRAGMA busy_timeout")) == 30_000


def test_newer_schema_is_refused(database):
    with engine_for(database.database_url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for action in (schema.check, schema.upgrade, lambda s: schema.downgrade(s, "base")):
        with pytest.raises(DatabaseError, match="'9999', which this version does not know"):
            action(database)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "mysql://me:secret@h/d", "nonsense:secret"]
)
def test_unusable_url(url):
    with pytest.raises(ConfigError, match="allowed: sqlite:///FILE") as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


def test_unreachable_server_is_one_line():
    url = "postgresql://me:secret@127.0.0.1:1/atlas"
    settings = replace(load_settings({}), database_url=url)
    with pytest.raises(DatabaseError) as caught:
        load_head(settings, "m", 0, 0, "me")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    settings = load_settings({"ATLAS_HOME": str(tmp_path / "file" / "home")})
    with pytest.raises(DatabaseError, match="cannot be made"):
        schema.upgrade(settings)


def test_file_that_is_no_database(tmp_path):
    path = tmp_path / "atlas.sqlite"
    path.write_bytes(b"certainly not a database" * 100)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    with pytest.raises(AtlasError, match="not a database"):
        load_head(settings, "m", 0, 0, "me")


def test_a_removed_file_is_made_anew(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    save_head(settings, HeadAnnotation("m", 0, 1, "me", label="old"), 0)
    for file in tmp_path.glob("atlas.sqlite*"):
        file.unlink()
    assert load_head(settings, "m", 0, 1, "me") is None
    assert save_head(settings, HeadAnnotation("m", 0, 1, "me", label="new"), 0).version == 1
    assert (tmp_path / "atlas.sqlite").exists()
    close_engines()


def test_a_full_disk_is_told_and_keeps_what_was_saved(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    saved = save_head(settings, HeadAnnotation("m", 0, 1, "me"), 0)
    engine = engine_for(settings.database_url)
    with engine.connect() as connection:
        pages = connection.scalar(text("PRAGMA page_count"))
        connection.execute(text(f"PRAGMA max_page_count = {pages + 12}"))

    def fill():
        for version in range(1, 21):
            save_head(settings, replace(saved, notes=f"{version}".zfill(20_000)), version)

    with pytest.raises(DatabaseError, match="disk is full") as caught:
        fill()
    assert not isinstance(caught.value, UnreachableError)
    found = load_head(settings, "m", 0, 1, "me")
    assert found is not None
    assert found.version > 1
    assert found.notes.lstrip("0") == str(found.version - 1)
    close_engines()


def test_unknown_revision(database):
    with pytest.raises(DatabaseError, match="schema 'nope' cannot be reached"):
        schema.upgrade(database, "nope")
    with pytest.raises(DatabaseError, match="schema 'nope' cannot be reached"):
        schema.downgrade(database, "nope")


def _upgrade_in_child(settings, gate, results):
    gate.wait()
    try:
        schema.ensure_schema(settings) if settings.database_url.startswith("sqlite") else schema.upgrade(
            settings
        )
        results.put("ok")
    except Exception as error:  # noqa: BLE001
        results.put(repr(error))


def test_processes_that_upgrade_at_once(empty_database):
    close_engines()
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(4), context.Queue()
    children = [
        context.Process(target=_upgrade_in_child, args=(empty_database, gate, results)) for _ in range(4)
    ]
    for child in children:
        child.start()
    answers = [results.get() for _ in children]
    for child in children:
        child.join()
    assert answers == ["ok"] * 4
    assert schema.check(empty_database) == NEWEST


def test_many_open_a_new_file_at_once(tmp_path):
    """SQLite refuses one of two that switch a new file to WAL at the same moment, without waiting."""

    def open_it(url, gate):
        gate.wait()
        with _make_engine(parse_url(url)).connect() as connection:
            return connection.exec_driver_sql("PRAGMA journal_mode").scalar()

    with ThreadPoolExecutor(4) as pool:
        for number in range(40):
            gate, url = threading.Barrier(4), f"sqlite:///{tmp_path / str(number)}.sqlite"
            opened = [pool.submit(open_it, url, gate) for _ in range(4)]
            assert [one.result() for one in opened] == ["wal"] * 4
