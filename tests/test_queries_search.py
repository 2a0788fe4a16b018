"""Finding features, against plain loops over the rows of the synthetic release."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from atlas.errors import QueryError
from atlas.store.connection import cursor, open_release
from atlas.store.families import FAMILIES
from atlas.store.indexes import INDEXES
from atlas.store.queries import evidence, overview, search, search_index, texts
from atlas.store.queries.search import PAGE, ROLES, Filters
from atlas.store.queries.search_index import COLUMNS
from tests.synthetic import MODEL, build_synthetic_release


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    path = build_synthetic_release(tmp_path_factory.mktemp("search") / "releases")
    with open_release(path) as connection:
        yield connection


@pytest.fixture(scope="module")
def saes(con):
    return tuple(ref.sae for ref in overview.sae_refs(con))


def rows(con, sql):
    return con.sql(sql).to_arrow_table().to_pylist()


def scores(found):
    return {(r["sae"], r["feature"]): r["score"] for r in found.to_pylist()}


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("role", ROLES)
def test_by_token_against_a_loop(con, role):
    table, value = {
        "at": ("token_stats WHERE role = 'at'", "precision"),
        "next": ("token_stats WHERE role = 'next'", "precision"),
        "up": ("logit_effects WHERE sign = 1", "value"),
        "down": ("logit_effects WHERE sign = -1", "value"),
        "from": ("dfa_tokens", "share"),
    }[role]
    all_rows = rows(con, f"SELECT * FROM {table}")
    tokens = tuple(sorted({row["token"] for row in all_rows}))[:3]
    expected = {}
    for row in all_rows:
        if row["token"] in tokens:
            key, size = (row["sae"], row["feature"]), abs(row[value])
            known = expected.get(key, 0.0)
            expected[key] = max(known, size) if role in ("up", "down") else known + size
    assert len(expected) > 0
    assert scores(search.by_token(con, tokens, role)) == pytest.approx(expected, rel=1e-5, abs=5.1e-4)


def test_a_release_without_the_indexes_is_searched_in_its_other_tables(tmp_path, con):
    path = build_synthetic_release(tmp_path / "releases")
    with duckdb.connect(str(path)) as old:
        for name in INDEXES:
            old.execute(f"DROP TABLE {name}")
    tokens = tuple(
        row["token"] for row in rows(con, "SELECT DISTINCT token FROM token_index ORDER BY 1 LIMIT 4")
    )
    places = pa.table([[0, 1, 2], [1, 1, 1], [20, 20, 20]], schema=texts.PLACES)
    sae, feature = con.execute("SELECT sae, feature FROM features WHERE alive LIMIT 1").fetchone()
    asked = [(search.by_token, tokens, role) for role in ROLES]
    asked += [(search.by_places, places), (search.like, sae, feature)]
    with open_release(path) as old:
        for query, *arguments in asked:
            found = query(con, *arguments)
            assert found.num_rows > 0
            assert query(old, *arguments).equals(found)


def test_no_token_finds_nothing_and_an_unknown_role_is_named(con):
    assert search.by_token(con, (), "at").num_rows == 0
    with pytest.raises(QueryError, match="role 'over' is not known; allowed: at, next"):
        search.by_token(con, (1,), "over")


def test_by_places_against_a_loop(con):
    docs = {row["block"]: row["tokens"] for row in rows(con, "SELECT * FROM docs")}
    places = [(block, p, p + 1) for block, tokens in docs.items() for p in range(1, len(tokens) - 1, 7)]
    table = pa.table(list(map(list, zip(*places, strict=True))), schema=texts.PLACES)
    for reach in (0, 2):
        expected = {}
        for row in rows(con, "SELECT * FROM examples WHERE example_group = 'top'"):
            near = any(b == row["block"] and lo <= row["position"] <= hi + reach for b, lo, hi in places)
            if near:
                key = (row["sae"], row["feature"])
                expected[key] = expected.get(key, 0) + 1
        assert len(expected) > 5
        assert scores(search.by_places(con, table, reach)) == expected
    assert search.by_places(con, texts.PLACES.empty_table()).num_rows == 0


def test_like_takes_the_largest_of_three_likenesses(con, saes):
    sae, feature = saes[0], 3
    expected = {}

    def note(key, value):
        if key != (sae, feature):
            expected[key] = max(expected.get(key, -2.0), value)

    for row in rows(con, "SELECT * FROM neighbours"):
        one, other = (row["sae"], row["feature"]), (row["other_sae"], row["other"])
        if one == (sae, feature):
            note(other, row["cosine"])
        if other == (sae, feature):
            note(one, row["cosine"])
    for row in rows(con, "SELECT * FROM coactivation"):
        if (row["sae"], row["feature"]) == (sae, feature):
            note((sae, row["other"]), row["jaccard"])
    up = {}
    for row in rows(con, "SELECT * FROM logit_effects WHERE sign = 1"):
        up.setdefault((row["sae"], row["feature"]), set()).add(row["token"])
    for key, tokens in up.items():
        if len(tokens & up[sae, feature]) >= 5:
            note(key, len(tokens & up[sae, feature]) / 20)
    assert scores(search.like(con, sae, feature)) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- filters, order, facets


def everything(con):
    """Every feature with all that filters are about, and its families by the release's own view."""
    kinds = {}
    for row in rows(con, "SELECT sae, feature, family FROM feature_families"):
        kinds.setdefault((row["sae"], row["feature"]), set()).add(row["family"])
    dfa = {(r["sae"], r["feature"]): r for r in rows(con, "SELECT * FROM dfa_summary")}
    found = []
    for row in rows(con, "SELECT * FROM features"):
        key = (row["sae"], row["feature"])
        values = {n: row[c] if t == "features" else dfa.get(key, {}).get(c) for n, (t, c) in COLUMNS.items()}
        found.append((key, values, kinds.get(key, set()), row["top_head"], row["alive"]))
    return found


def expected_keys(con, filters, only=None):
    kept = []
    for key, values, kinds, head, alive in everything(con):
        inside = all(
            values[n] is not None and (lo is None or values[n] >= lo) and (hi is None or values[n] <= hi)
            for n, lo, hi in filters.ranges
        )
        if (
            key[0] in filters.saes and inside and set(filters.families) <= kinds
            and filters.head in (None, head) and (alive or "dead" in filters.families)
            and (only is None or key in only)
        ):  # fmt: skip
            kept.append((key, values, kinds, head))
    return kept


CASES = [
    {},
    {"families": ("single_token",)},
    {"families": ("dead",), "order": "encoder_norm"},
    {"families": ("induction", "local_context")},
    {"head": 1},
    {"ranges": (("density", 0.001, 0.05),), "order": "-density"},
    {"ranges": (("dfa_distance", 2.0, None), ("n_active", None, 500.0)), "order": "dfa_distance"},
    {"ranges": (("loss_effect", None, None),), "order": "loss_effect"},
    {"order": "-top_position_share"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_and_facets_against_a_loop(con, saes, case):
    filters = Filters(saes, **case)
    expected = expected_keys(con, filters)
    order, down = filters.order.removeprefix("-"), not filters.order.startswith("-")

    def place(item):
        value = item[1][order]
        return (value is None, (-value if down else value) if value is not None else 0, item[0])

    expected.sort(key=place)
    pages = [search.page(con, filters, None, start) for start in (0, PAGE, 2 * PAGE)]
    listed = [(r["sae"], r["feature"]) for page in pages for r in page.to_pylist()]
    assert listed == [key for key, *_ in expected[: 3 * PAGE]]
    facets = search.facets(con, filters)
    assert facets.n == len(expected) == sum(facets.saes.values())
    for family in FAMILIES:
        assert facets.families.get(family, 0) == sum(family in kinds for _, _, kinds, _ in expected), family
    heads = [(key[0], head) for key, _, _, head in expected if head is not None]
    assert facets.heads == {pair: heads.count(pair) for pair in heads}


def test_candidates_are_narrowed_and_keep_their_score(con, saes):
    chosen = [(saes[0], f, f / 10) for f in range(40)] + [(saes[1], 2, 9.0), ("gone", 1, 1.0)]
    table = pa.table(list(map(list, zip(*chosen, strict=True))), schema=search.CANDIDATES)
    filters = Filters(saes[:1], order="score")
    score = {(s, f): v for s, f, v in chosen}
    expected = [key for key, *_ in expected_keys(con, filters, set(score))]
    expected.sort(key=lambda key: (-score[key], key))
    found = search.page(con, filters, table).to_pylist()
    assert [(r["sae"], r["feature"]) for r in found] == expected
    assert [r["score"] for r in found] == [score[key] for key in expected]
    assert search.facets(con, filters, table).n == len(expected)


def test_filters_agree_with_the_families_of_features(con, saes):
    found = search.page(con, Filters(saes, families=("duplicate_token",))).to_pylist()
    for sae, group in itertools.groupby(found, key=lambda row: row["sae"]):
        ids = [row["feature"] for row in group]
        assert all("duplicate_token" in evidence.families(con, sae, ids)[one] for one in ids)


def test_pages_name_the_families_of_the_release(con, saes):
    kinds = {key: families for key, _, families, _, _ in everything(con)}
    found = search.page(con, Filters(saes)).to_pylist()
    assert any(row["families"] for row in found)
    for row in found:
        assert set(search.families_in(row["families"])) == kinds[row["sae"], row["feature"]]


def test_more_features_than_are_kept_in_memory_give_the_same_answers(con, saes, monkeypatch):
    path = con.execute("SELECT path FROM duckdb_databases() WHERE database_name = 'atlas'").fetchone()[0]
    monkeypatch.setattr(search_index, "MOST", 3)
    with open_release(path) as other:
        for case in CASES[:4]:
            filters = Filters(saes, **case)
            assert search.page(other, filters).equals(search.page(con, filters))
            assert search.facets(other, filters) == search.facets(con, filters)
        kept = "SELECT (SELECT count(*) FROM duckdb_views() WHERE view_name = 'search_features')"
        assert other.execute(kept).fetchall() == [(1,)]


def test_the_table_of_features_is_made_once_for_all_cursors(con):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: search_index.make_ready(cursor(con)), range(8)))
    made = "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'search_features'"
    assert con.execute(made).fetchall() == [(1,)]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"families": ("odd",)}, "family 'odd' is not known"),
        ({"ranges": (("colour", 0, 1),)}, "column 'colour' is not known"),
        ({"ranges": (("density", 1.0, 0.5),)}, "range of density: 1 to 0.5 is empty"),
        ({"order": "-colour"}, "order 'colour' is not known"),
    ],
)
def test_what_is_refused(case, said):
    with pytest.raises(QueryError, match=said):
        Filters(("s",), **case)


def test_a_release_made_before_dfa_summary(saes):
    con = duckdb.connect()
    columns = "sae VARCHAR, feature INT, alive BOOL, top_head INT, top_token INT, density DOUBLE"
    con.execute(f"CREATE TABLE features ({columns}, max_activation FLOAT)")
    with pytest.raises(QueryError, match="was made before dfa_summary"):
        search.page(con, Filters(saes, ranges=(("dfa_local", 0.5, None),)))
    assert search.page(con, Filters(saes)).num_rows == 0
    assert search.by_token(con, (1,), "from").num_rows == 0


def test_every_column_has_a_meaning():
    assert all(search.meaning(name) for name in COLUMNS)


# ---------------------------------------------------------------- text


def text_release(pieces, blocks):
    con = duckdb.connect()
    con.execute("CREATE TABLE vocab (model VARCHAR, token INT, text VARCHAR, bytes BLOB)")
    con.executemany("INSERT INTO vocab VALUES ('m', ?, '', ?)", list(enumerate(pieces)))
    con.execute("CREATE TABLE docs (block INT, tokens INT[], source VARCHAR)")
    if blocks:
        con.executemany("INSERT INTO docs VALUES (?, ?, '')", list(enumerate(blocks)))
    return con


def test_places_of_a_text_are_the_tokens_that_it_touches():
    con = text_release([b"<bos>", b"ab", b"c", b" The", b"the"], [[0, 1, 2, 1, 3], [0, 4, 4, 2]])
    found = texts.read_texts(con, "m")
    assert [found.text(row) for row in range(2)] == ["abcab The", "thethec"]
    at = [tuple(row.values()) for row in texts.places_of(found, "bc").to_pylist()]
    assert at == [(0, 1, 2)]
    at = [tuple(row.values()) for row in texts.places_of(found, "the").to_pylist()]
    assert at == [(0, 4, 4), (1, 1, 1), (1, 2, 2)]
    assert texts.places_of(found, "the", exact=True).num_rows == 2
    assert texts.places_of(found, "the", most=1).num_rows == 1
    assert texts.places_of(found, "ba").num_rows == 0
    with pytest.raises(QueryError, match="empty"):
        texts.places_of(found, "")


def test_characters_of_several_bytes_and_cut_in_two():
    whole = "né→x".encode()
    pieces = [b"<bos>", whole[:2], whole[2:4], whole[4:]]
    con = text_release(pieces, [[0, 1, 2, 3]])
    found = texts.read_texts(con, "m")
    assert found.text(0) == "né→x"
    assert texts.places_of(found, "x").to_pylist() == [{"block": 0, "low": 3, "high": 3}]
    assert texts.places_of(found, "n").to_pylist() == [{"block": 0, "low": 1, "high": 1}]
    # é is cut in two: it touches the tokens of both halves. Its capital is found, too.
    assert texts.places_of(found, "É").to_pylist() == [{"block": 0, "low": 1, "high": 2}]
    assert texts.places_of(found, "É", exact=True).num_rows == 0
    assert found.positions(0, range(4)) == [1, 1, 2, 3]


def test_bytes_that_are_no_text_hold_their_places():
    con = text_release([b"<bos>", b"\xf0\x9f", "é🙂".encode(), b"\x80z"], [[0, 1, 2, 3], [0, 3, 3]])
    found = texts.read_texts(con, "m")
    assert [len(found.text(row)) for row in range(2)] == [6, 4]
    assert found.positions(0, range(6)) == [1, 1, 2, 2, 3, 3]
    assert found.positions(1, range(4)) == [1, 1, 2, 2]


def test_nothing_is_found_across_blocks_and_places_may_overlap():
    con = text_release([b"<bos>", b"aa", b"a.a"], [[0, 1], [0, 1, 2], [0, 3]])
    found = texts.read_texts(con, "m")
    assert texts.places_of(found, "aaaa").num_rows == 0
    at = [tuple(row.values()) for row in texts.places_of(found, "aa").to_pylist()]
    assert at == [(0, 1, 1), (1, 1, 1), (1, 1, 2)]
    assert texts.places_of(found, "a.a").num_rows == 1
    assert texts.places_of(found, "bos").num_rows == 0


def test_a_release_without_text():
    found = texts.read_texts(text_release([b"<bos>"], []), "m")
    assert found.complete
    assert texts.places_of(found, "a").num_rows == 0


def test_a_long_text_is_read_in_part():
    con = text_release([b"", b"a"], [[0, 1]] * 10)
    assert texts.read_texts(con, "m", most=6).blocks.tolist() == [0, 1, 2]
    assert not texts.read_texts(con, "m", most=6).complete
    assert texts.read_texts(con, "m").complete


def test_the_synthetic_text_is_what_its_tokens_say(con):
    found = texts.read_texts(cursor(con), MODEL)
    known = {r["token"]: r["bytes"] for r in rows(con, "SELECT token, bytes FROM vocab")}
    for row in rows(con, "SELECT * FROM docs ORDER BY block LIMIT 5"):
        whole = b"".join(known[t] for t in row["tokens"][1:])
        assert found.text(row["block"]) == whole.decode("utf8", errors="surrogateescape")
        first = found.rows[row["block"]]
        for position in range(1, len(row["tokens"])):
            if known[row["tokens"][position]]:
                start = found.starts[first + position]
                assert found.token_at(start) == first + position
    assert np.all(np.diff(found.starts) >= 0)
