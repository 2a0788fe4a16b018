"""Feature families: each rule against features made for it, and the views against the rules."""

from pathlib import Path

import pyarrow as pa
import pytest

from atlas.store import release
from atlas.store.connection import open_release
from atlas.store.families import FAMILIES
from atlas.store.parquet import write_table
from atlas.tables import FAMILY_NAMES, TABLES
from tests.synthetic import build_synthetic_release, synthetic_rows, to_arrow
from tests.synthetic_world import PAIR, POSITION, TOKEN

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
NOTHING = {
    table: {f.name: "" if f.type == pa.string() else 0 for f in TABLES[table].columns if not f.nullable}
    for table in ("features", "dfa_summary")
}
FIRES = {"alive": True, "n_active": 10, "density": 0.01}
READS = {"n": 5, "bos": 0.1, "current": 0.1, "previous": 0.1, "same_token": 0.1, "after_match": 0.1,
         "local": 0.1, "long_range": 0.1, "matched": 0.0}  # fmt: skip
CASES = [
    ("features", {"alive": False}, {"dead"}),
    ("features", FIRES, set()),
    ("features", FIRES | {"density": 0.1}, set()),
    ("features", FIRES | {"density": 0.11}, {"dense"}),
    ("features", FIRES | {"top_position_share": 0.5}, {"positional"}),
    ("features", FIRES | {"top_position_share": 0.49}, set()),
    ("features", FIRES | {"top_position_share": 1.0, "n_active": 9}, set()),
    ("features", FIRES | {"top_token_share": 0.9, "top_pair_share": 0.3}, {"single_token"}),
    ("features", FIRES | {"top_token_share": 0.9, "top_pair_share": 0.85}, {"bigram"}),
    ("features", FIRES | {"top_token_share": 1.0, "top_pair_share": 1.0, "n_active": 9}, set()),
    ("features", FIRES | {"top_token_share": 0.9, "top_pair_share": 0.1, "top_position_share": 0.6,
                          "density": 0.2}, {"single_token", "positional", "dense"}),
    ("dfa_summary", READS, set()),
    ("dfa_summary", READS | {"previous": 0.5, "local": 0.6}, {"previous_token"}),
    ("dfa_summary", READS | {"previous": 0.9, "n": 4}, set()),
    ("dfa_summary", READS | {"same_token": 0.6, "after_match": 0.2}, {"duplicate_token"}),
    ("dfa_summary", READS | {"same_token": 0.6, "after_match": 0.7, "matched": 1.0}, {"induction"}),
    ("dfa_summary", READS | {"after_match": 0.6, "matched": 0.5}, {"induction"}),
    ("dfa_summary", READS | {"after_match": 0.6, "matched": 0.4}, set()),
    ("dfa_summary", READS | {"after_match": 0.6, "matched": 1.0, "previous": 0.6}, {"previous_token"}),
    ("dfa_summary", READS | {"local": 0.5, "previous": 0.4}, {"local_context"}),
    ("dfa_summary", READS | {"long_range": 0.5, "after_match": 0.6, "matched": 1.0},
     {"long_range_context", "induction"}),
    ("dfa_summary", {"n": 5}, set()),
]  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A release in which feature i of SAE ``s`` is case i."""
    folder = tmp_path_factory.mktemp("cases")
    parts = {}
    for table, empty in NOTHING.items():
        rows = [
            empty | {"sae": "s", "feature": i} | values
            for i, (of, values, _) in enumerate(CASES) if of == table
        ]  # fmt: skip
        parts[table] = [folder / f"{table}.parquet"]
        write_table(parts[table][0], table, to_arrow(table, rows))
    return open_release(release.publish(folder, "cases", parts, {}).path)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_rule_takes_what_it_says_and_nothing_else(cases, number):
    query = "SELECT family, value FROM feature_families WHERE sae = 's' AND feature = ?"
    found = dict(cases.execute(query, [number]).fetchall())
    table, values, expected = CASES[number]
    assert set(found) == expected
    for family, value in found.items():
        assert (FAMILIES[family].table, value) == (
            table,
            pytest.approx(values.get(FAMILIES[family].value, 0)),
        )


def test_every_rule_has_a_case():
    assert set().union(*(expected for _, _, expected in CASES)) == set(FAMILY_NAMES) == set(FAMILIES)


def test_families_describe_themselves(cases):
    rows = cases.sql("SELECT family, table_name, rule, meaning, origin FROM families ORDER BY number")
    assert rows.fetchall() == [(f.name, f.table, f.rule, f.meaning, f.origin) for f in FAMILIES.values()]


def test_the_page_has_every_rule():
    text = PAGE.read_text("utf-8")
    for family in FAMILIES.values():
        assert f"| `{family.name}` | `{family.table}` | `{family.rule}` |" in text


def test_synthetic_heads_and_features_are_what_they_were_made_for(tmp_path):
    """Planted features are found by their families, and heads' families are those of their patterns."""
    con = open_release(build_synthetic_release(tmp_path))
    k = "WHERE sae LIKE '%.k.%' AND feature < 3 AND family IN ('positional', 'single_token', 'bigram')"
    found = con.sql(f"SELECT feature, family FROM feature_families {k} ORDER BY ALL").fetchall()
    assert found == [(0, "positional"), (1, "single_token"), (2, "bigram")]
    tops = con.sql(
        "SELECT feature, top_position, top_token FROM features WHERE sae LIKE '%.k.%' AND feature < 3"
    )
    by_feature = {feature: (position, token) for feature, position, token in tops.fetchall()}
    assert (by_feature[0][0], by_feature[1][1], by_feature[2][1]) == (POSITION, TOKEN, PAIR[1])
    best = con.sql("""
        SELECT layer, head, family FROM (SELECT layer, head,
            {'previous_token': n_previous_token, 'duplicate_token': n_duplicate_token,
             'induction': n_induction} AS counts FROM head_summary),
            (VALUES ('previous_token'), ('duplicate_token'), ('induction')) v(family)
        WHERE CASE family WHEN 'induction' THEN counts.induction WHEN 'previous_token'
            THEN counts.previous_token ELSE counts.duplicate_token END >= 8 ORDER BY ALL""").fetchall()
    assert best == [(0, 0, "previous_token"), (0, 1, "duplicate_token"), (1, 1, "induction")]


def test_members_are_those_of_the_rows(tmp_path):
    """The view against the rules applied by hand to the rows of the tables."""
    size = {"seed": 7, "n_layers": 2, "n_heads": 3, "d_sae": 40, "n_blocks": 20, "context": 48}
    rows = synthetic_rows(**size)
    expected = set()
    for r in rows["dfa_summary"]:
        if r["n"] < 5 or r["previous"] is None:
            continue
        induction = r["after_match"] >= 0.5 and r["matched"] >= 0.5
        holds = {
            "previous_token": r["previous"] >= 0.5,
            "duplicate_token": r["same_token"] >= max(0.5, r["after_match"]),
            "induction": induction and r["after_match"] > max(r["previous"], r["same_token"]),
            "local_context": r["local"] >= 0.5 > r["previous"],
            "long_range_context": r["long_range"] >= 0.5,
        }
        expected |= {(r["sae"], r["feature"], name) for name, yes in holds.items() if yes}
    con = open_release(build_synthetic_release(tmp_path, **size))
    found = con.sql("SELECT sae, feature, family FROM feature_families WHERE value IS NOT NULL").fetchall()
    of_dfa = {name for name, family in FAMILIES.items() if family.table == "dfa_summary"}
    assert {row for row in found if row[2] in of_dfa} == expected
    assert {family for _, _, family in expected} >= {"previous_token", "induction", "local_context"}


def test_dfa_sources_are_the_lists_of_dfa(tmp_path):
    size = {"seed": 7, "n_layers": 1, "n_heads": 2, "d_sae": 8, "n_blocks": 6, "context": 12}
    rows = synthetic_rows(**size)
    places = {
        (r["sae"], r["feature"], r["example_group"], r["rank"]): (r["block"], r["position"])
        for r in rows["examples"]
    }
    expected = []
    for r in rows["dfa"]:
        key = (r["sae"], r["feature"], r["example_group"], r["rank"])
        block, position = places[key]
        for s in r["sources"]:
            row = (*key, s["head"], s["source"], block, position, position - s["source"])
            expected.append((row, s["weight"] * float(r["unit"])))
    con = open_release(build_synthetic_release(tmp_path, **size))
    found = con.sql("""SELECT sae, feature, example_group, rank, head, source, block, position, distance,
                       contribution FROM dfa_sources""").fetchall()
    assert sorted(row[:-1] for row in found) == sorted(row for row, _ in expected)
    by_key = dict(expected)
    assert all(row[-1] == pytest.approx(by_key[row[:-1]], rel=1e-6) for row in found)
