"""A user's SQL: what is asked is answered, what attacks is refused, and nothing is ever written."""

import threading
import time

import pyarrow as pa
import pytest

from atlas.errors import Cancelled, ConfigError, QueryError, StoreError
from atlas.store import sandbox, sandbox_child
from atlas.store.sandbox import run_sql
from tests.synthetic import build_synthetic_release


def names(folder):
    return sorted(p.name for p in folder.iterdir())


SECRET = "do not read me"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases")
    return build_synthetic_release(folder, d_sae=16, n_blocks=8, context=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with files to steal, and room for files to leave."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "secret.csv").write_text(f"a\n{SECRET}\n")
    return folder


NOTES = {
    "head_annotations": pa.table(
        {
            "layer": pa.array([0, 1], pa.int16()),
            "head": pa.array([0, 1], pa.int16()),
            "label": ["prev", "ind"],
        }
    )
}


def ask(path, text, **bounds):
    return run_sql(text, path, NOTES, **{"seconds": 300, "memory": "500MB", "rows": 50, **bounds})


def column(path, text, **bounds):
    return ask(path, text, **bounds).table.column(0).to_pylist()


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1 AS x",
        "SELECT 1 AS x;",
        "  ;; SELECT 1 AS x ; ; ",
        "SELECT 1 AS x -- a comment; with a semicolon",
        "SELECT 1 AS x; -- a comment; with a semicolon",
        "/* first; */ SELECT 1 AS x /* ; */ ; -- '",
        "-- first\nSELECT 1 AS x\n-- last",
        "FROM (SELECT 1 AS x)",
        "VALUES (1)",
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a",
    ],
)
def test_ways_to_write_one_query(path, text):
    assert column(path, text) == [1]


def test_semicolons_in_texts_stay(path):
    assert column(path, "SELECT ';' || \"a;b\" || $$;'$$ FROM (SELECT 'é;' AS \"a;b\"); -- ;") == [";é;;'"]


def test_order_is_kept_under_the_row_bound(path):
    wanted = list(range(99_999, 99_949, -1))
    result = ask(path, "SELECT i FROM range(100000) t(i) ORDER BY i DESC -- all of them")
    assert result.table.column(0).to_pylist() == wanted
    assert result.truncated
    assert result.seconds > 0
    assert not ask(path, "SELECT i FROM range(50) t(i)").truncated
    assert ask(path, "SELECT i FROM range(51) t(i)").truncated


def test_release_views_and_annotations_join(path):
    text = """SELECT label FROM head_features JOIN head_annotations USING (layer, head)
              WHERE decoder_rank = 0 ORDER BY ALL"""
    assert column(path, text) == ["ind", "prev"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("DESCRIBE saes", "sae"),
        ("DESCRIBE SELECT 1 AS y", "y"),
        ("SHOW TABLES", "activation_counts"),
        ("SUMMARIZE saes", "sae"),
    ],
)
def test_statements_that_describe(path, text, first):
    assert column(path, text)[0] == first


def test_explain_shows_the_plan_of_a_query_only(path):
    assert "saes" in column(path, "EXPLAIN SELECT * FROM saes;")[0]
    assert "saes" in column(path, "EXPLAIN ANALYZE SELECT * FROM saes")[0]


def test_pivot_with_written_values_works_and_without_says_how(path):
    scores = "(SELECT score, head, value FROM head_scores)"
    text = f"SELECT * FROM (PIVOT {scores} ON head IN (0, 1) USING max(value))"
    assert ask(path, text).table.column_names == ["score", "0", "1"]
    with pytest.raises(QueryError, match="write them out: ON column IN"):
        ask(path, "PIVOT head_scores ON head USING max(value)")


ATTACKS = [
    "COPY (SELECT 1) TO '{place}/out.csv'",
    "WITH a AS (COPY (SELECT 1) TO '{place}/out.csv') SELECT 1",
    "WITH a AS (COPY (SELECT 1) TO '{place}/out.csv') SELECT * FROM a",
    "SELECT * FROM (WITH a AS (COPY saes TO '{place}/out.parquet') SELECT 1)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{place}/out.csv'",
    "EXPLAIN ANALYZE WITH a AS (COPY (SELECT 1) TO '{place}/out.csv') SELECT 1",
    "EXPLAIN EXPLAIN COPY (SELECT 1) TO '{place}/out.csv'",
    "FROM query('COPY (SELECT 1) TO ''{place}/out.csv''')",
    "FROM query('WITH a AS (COPY (SELECT 1) TO ''{place}/out.csv'') SELECT 1')",
    "EXPORT DATABASE '{place}/out'",
    "SELECT * FROM read_csv('{place}/secret.csv')",
    "SELECT * FROM '{place}/secret.csv'",
    "SELECT * FROM read_text('{place}/secret.csv')",
    "SELECT * FROM read_blob('{place}/*')",
    "SELECT * FROM sniff_csv('{place}/secret.csv')",
    "SELECT * FROM glob('{place}/*')",
    "SELECT * FROM read_parquet('{place}/secret.csv')",
    "SELECT * FROM read_json('{place}/secret.csv')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_csv('/dev/stdin')",
    "SELECT * FROM 'https://127.0.0.1:9/x.parquet'",
    "ATTACH '{place}/out.db'",
    "ATTACH ':memory:' AS other",
    "DETACH atlas",
    "USE memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{place}/x.duckdb_extension'",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "SET memory_limit = '100GB'",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "CALL enable_logging()",
    "FROM enable_logging(storage = 'file', storage_config = {{'path': '{place}/out'}})",
    "FROM enable_profiling(save_location = '{place}/out')",
    "CREATE TABLE x AS SELECT 1",
    "CREATE TABLE memory.main.x AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "CREATE SECRET (TYPE s3)",
    "DROP TABLE saes",
    "DELETE FROM saes",
    "UPDATE saes SET k = 1",
    "INSERT INTO saes SELECT * FROM saes",
    "WITH a AS (DELETE FROM saes RETURNING *) SELECT * FROM a",
    "WITH a AS (INSERT INTO vocab SELECT * FROM vocab RETURNING *) SELECT * FROM a",
    "WITH a AS (UPDATE saes SET k = 1 RETURNING *) SELECT * FROM a",
    "TRUNCATE saes",
    "VACUUM",
    "CHECKPOINT",
    "BEGIN",
    "PREPARE a AS SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE saes",
    "SELECT 1) ; DROP TABLE saes; SELECT * FROM (SELECT 1",
    "SELECT 1) t; --",
    "SELECT 1 /* open",
    "SELECT getenv('ATLAS_SECRET')",
    "SELECT $1",
    "SELECT ?",
    "SELECT * FROM NOTES",
    "SELECT * FROM request",
    "SELECT * FROM pyarrow_table",
    "",
    ";",
    "-- nothing",
    "FROM force_checkpoint('atlas')",
    "SELECT * FROM duckdb_secrets()",
]


@pytest.fixture
def untouched(path, place, monkeypatch):
    monkeypatch.setenv("ATLAS_SECRET", SECRET)
    before = path.read_bytes()
    yield
    assert names(place) == ["secret.csv"]
    assert path.read_bytes() == before
    assert names(path.parent) == [".lock", "current.json", path.name]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_by_the_connection_alone(path, place, attack, untouched):
    """The first wall: DuckDB's locks and the check of the statement, without the limits of the process."""
    request = {"sql": attack.format(place=place), "path": str(path), "seconds": 5.0, "memory": "500MB"}
    head, table = sandbox_child.answer(
        {**request, "rows": 10, "bytes": 1_000_000, "threads": 1},
        {"head_annotations": NOTES["head_annotations"]},
    )
    assert table is None
    assert head["error"]
    assert SECRET not in head["error"]


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if a.startswith(("WITH a AS (COPY", "SELECT 1)", "INSTALL"))]
)
def test_attack_is_refused_by_the_whole_sandbox(path, place, attack, untouched):
    with pytest.raises(QueryError) as caught:
        ask(path, attack.format(place=place))
    assert SECRET not in str(caught.value)


def test_the_process_may_write_no_file_even_if_duckdb_let_it(path, place, monkeypatch, tmp_path):
    """The second wall: with DuckDB's own locks taken away, a write still fails."""
    weak = tmp_path / "child.py"
    source = sandbox._CHILD.read_text().replace('con.execute("SET enable_external_access = false")', "pass")
    assert source != sandbox._CHILD.read_text()
    weak.write_text(source)
    monkeypatch.setattr(sandbox, "_CHILD", weak)
    with pytest.raises((QueryError, RuntimeError)):
        ask(path, f"WITH a AS (COPY (SELECT 1) TO '{place}/out.csv') SELECT * FROM a")
    left = [file for file in place.iterdir() if file.name != "secret.csv"]
    assert all(file.stat().st_size == 0 for file in left)
    for file in left:
        file.unlink()


@pytest.mark.parametrize(
    "text",
    [
        "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t) SELECT count(*) FROM t",
        "SELECT sum(hash(a.i, b.i, c.i)) FROM range(9999) a(i), range(9999) b(i), range(9999) c(i)",
        "SELECT sum(length(repeat(a.text, 5000000))) FROM vocab a, vocab b, vocab c",
    ],
)
def test_endless_query_is_stopped_at_its_bound(path, text):
    begun = time.monotonic()
    with pytest.raises(QueryError, match="stopped after its bound of 1 seconds"):
        ask(path, text, seconds=1, memory="1GB")
    assert time.monotonic() - begun < 60  # of the hours that it would take


@pytest.mark.parametrize(
    "text",
    [
        "SELECT list(i) FROM range(1000000000) t(i)",
        "SELECT repeat('x', 3000000000)",
        "SELECT length(repeat('x', 4000000000))",
        "SELECT i, count(*) FROM range(300000000) t(i) GROUP BY i ORDER BY 2",
    ],
)
def test_query_beyond_its_memory_is_stopped_and_says_the_bound(path, text):
    with pytest.raises(QueryError, match="needs more memory than its bound of 100MB"):
        ask(path, text, memory="100MB")


def test_huge_result_is_cut_by_rows_and_by_bytes(path):
    many = ask(path, "SELECT i FROM range(1000000000) t(i)", rows=1000)
    assert (many.table.num_rows, many.truncated) == (1000, True)
    wide = ask(path, "SELECT repeat('x', 1000000) FROM range(100)", rows=200)
    assert wide.truncated
    assert wide.table.num_rows in (62, 63, 64)
    with pytest.raises(QueryError, match="one row is larger than the bound of 64 MB"):
        ask(path, "SELECT repeat('x', 65000000)", memory="2GB")


@pytest.mark.parametrize(
    ("text", "line", "mark"),
    [
        ("SELECT *\nFORM saes", "LINE 2: FORM saes", 13),
        ("SELECT sae,\n  kk\nFROM saes", "LINE 2:   kk", 10),
        ("SELECT 1 FROM sase", "LINE 1: SELECT 1 FROM sase", 22),
        ("SELECT 1,\n  CAST(text AS INT) FROM vocab", "LINE 2:   CAST(text AS INT) FROM vocab", 10),
    ],
)
def test_errors_point_at_the_place_in_the_users_text(path, text, line, mark):
    with pytest.raises(QueryError) as caught:
        ask(path, text)
    lines = str(caught.value).splitlines()
    assert line in lines
    assert lines[lines.index(line) + 1].index("^") == mark
    assert len(lines) <= 8


def test_cancel_stops_at_once(path):
    cancel = threading.Event()
    threading.Timer(0.5, cancel.set).start()
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        ask(path, "SELECT sum(hash(a.i, b.i)) FROM range(999999) a(i), range(999999) b(i)", cancel=cancel)
    assert time.monotonic() - begun < 60  # of the hours that it would take


def test_queries_at_once_do_not_meet(path):
    results = {}

    def run(i):
        results[i] = column(path, f"SELECT {i} + count(*) FROM saes")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (n,) = column(path, "SELECT count(*) FROM saes")
    assert results == {i: [i + n] for i in range(4)}


@pytest.fixture
def spare(monkeypatch):
    """Children that wait, none at first; those left over end with the test."""
    kept = sandbox._Spare()
    monkeypatch.setattr(sandbox, "_spare", kept)
    yield kept
    for child in kept._children:
        child.kill()
        child.communicate()


def test_waiting_processes_serve_the_next_queries_in_turn(path, spare):
    for _ in range(3):
        sandbox.prewarm()
    first, second = spare._children  # never more than two
    assert column(path, "SELECT 1") == [1]
    assert (first.returncode, second.poll()) == (0, None)
    assert column(path, "SELECT 2") == [2]
    assert second.returncode == 0
    assert spare._children == []
    assert column(path, "SELECT 3") == [3]


def test_a_waiting_process_that_died_is_replaced(path, spare):
    sandbox.prewarm()
    (dead,) = spare._children
    dead.kill()
    dead.wait()
    assert column(path, "SELECT 1") == [1]
    sandbox.prewarm()
    (other,) = spare._children
    other.kill()
    other.wait()
    sandbox.prewarm()
    assert [child.poll() for child in spare._children] == [None]


def test_missing_release_and_bad_bounds(path, tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        ask(tmp_path / "none.duckdb", "SELECT 1")
    (tmp_path / "bad.duckdb").write_bytes(b"x" * 20_000)
    with pytest.raises(QueryError, match="cannot open the release"):
        ask(tmp_path / "bad.duckdb", "SELECT 1")
    for bound in ("", "lots", "1", "-1GB", "1 parsec"):
        with pytest.raises(ConfigError, match="cannot be read; write it like"):
            ask(path, "SELECT 1", memory=bound)


def test_types_that_sql_can_return_arrive(path):
    text = """SELECT 1::HUGEINT, 1.5::DECIMAL(9,2), DATE '2020-01-02', INTERVAL 3 DAY, uuid(), [1, NULL],
              {'a': 1}, MAP {'k': 2},
              'x'::BLOB, true, NULL, 'b'::ENUM ('a', 'b'), '{"a":1}'::JSON, TIME '01:02:03'"""
    assert ask(path, text).table.num_rows == 1
