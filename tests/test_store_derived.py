"""head_summary against the same numbers worked out in plain Python from the rows of the other tables."""

from collections import defaultdict
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from atlas.store import build, release
from atlas.store.connection import open_release
from atlas.store.derived import DERIVED, derive
from atlas.store.parquet import write_table
from atlas.tables import DFA_SHARES, F32, FAMILY_NAMES, TABLES
from tests.synthetic import build_synthetic_release, synthetic_rows, to_arrow

SIZE = {"seed": 4, "n_layers": 2, "n_heads": 3, "d_sae": 40, "n_blocks": 16, "context": 24}


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(**SIZE)


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    return open_release(build_synthetic_release(tmp_path_factory.mktemp("releases"), **SIZE))


def average_ranks(values):
    """Ranks from 1; ties share the mean of theirs."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def correlation(xs, ys):
    n, mx, my = len(xs), sum(xs) / len(xs), sum(ys) / len(ys)
    cov = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / n
    return cov / (sum((x - mx) ** 2 for x in xs) / n * sum((y - my) ** 2 for y in ys) / n) ** 0.5


def expected(shares, top_heads, families, head):
    """One row of head_summary from the head's rows of alive features, by feature."""
    decoder = {f: row["decoder_share"] for f, row in shares.items()}
    row = {
        "n_features": len(shares),
        "n_top": sum(top_heads[f] == head for f in shares),
        "effective_features": sum(decoder.values()) ** 2 / sum(d * d for d in decoder.values()),
        "max_decoder_share": max(decoder.values()),
    }
    for measure in ("decoder_share", "fve", "dfa_share"):
        top = sorted((r[measure] for r in shares.values()), reverse=True)[:10]
        row[f"top10_{measure}"] = sum(top) / len(top)
    pairs = {"decoder_fve": ("decoder_share", "fve"), "decoder_dfa": ("decoder_share", "dfa_share")}
    for name, (one, other) in {**pairs, "fve_dfa": ("fve", "dfa_share")}.items():
        ranks = [average_ranks([r[measure] for r in shares.values()]) for measure in (one, other)]
        row[f"corr_{name}"] = correlation(*ranks)
    for name, column in [("distance", "dfa_distance"), *((n, f"dfa_{n}") for n in DFA_SHARES)]:
        found = [(max(r["fve"], 0), r[column]) for r in shares.values() if r[column] is not None]
        row[name] = sum(w * x for w, x in found) / sum(w for w, _ in found)
    counts = {name: sum(top_heads[f] == head for f in families[name]) for name in FAMILY_NAMES}
    return row | {f"n_{name}": n for name, n in counts.items()}


def test_every_number_of_head_summary(con, rows):
    found = con.sql("SELECT * FROM head_summary").to_arrow_table().to_pylist()
    z = {row["sae"]: row["layer"] for row in rows["saes"] if row["site"] == "z"}
    assert [(r["layer"], r["head"]) for r in found] == [(la, h) for la in (0, 1) for h in range(3)]
    families = defaultdict(lambda: defaultdict(set))
    for sae, feature, family in con.sql("SELECT sae, feature, family FROM feature_families").fetchall():
        families[sae][family].add(feature)
    for row in found:
        sae, head = row["sae"], row["head"]
        assert (row["model"], row["layer"]) == ("synthetic", z[sae])
        features = {r["feature"]: r for r in rows["features"] if r["sae"] == sae}
        top_heads = {f: r["top_head"] for f, r in features.items()}
        alive = {f for f, r in features.items() if r["alive"]}
        shares = {
            r["feature"]: r
            for r in rows["head_attribution"]
            if r["sae"] == sae and r["head"] == head and r["feature"] in alive
        }
        assert alive != set(features)
        for name, value in expected(shares, top_heads, families[sae], head).items():
            # Ranks of shares that are equal as 32-bit numbers only would move a correlation.
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (sae, head, name)
    assert sum(row["n_induction"] for row in found) > 0
    assert sum(row["n_dead"] for row in found) == sum(len(families[sae]["dead"]) for sae in z)


FEATURE = {f.name: 0 for f in TABLES["features"].columns if not f.nullable} | {"sae": "m/L00.z.topk-4"}
SHARE = dict.fromkeys(TABLES["head_attribution"].schema.names) | {"sae": "m/L00.z.topk-4"}
SAE = {f.name: "" if f.type == pa.string() else 0 for f in TABLES["saes"].columns} | {
    "sae": "m/L00.z.topk-4", "model": "m", "site": "z", "head": None, "include_bos": False, "k": None,
}  # fmt: skip


def publish(folder, shares, alive=(True,) * 4, **sae):
    """A release of one SAE with two heads from (decoder, fve, dfa) of head 0; head 1 has the rest."""
    features = [
        FEATURE | {"feature": f, "alive": a, "top_head": 0, "density": 0.0, "pruned": 0}
        for f, a in enumerate(alive)
    ]
    attribution = []
    for f, (decoder, fve, dfa, distance) in enumerate(shares):
        row = SHARE | {"feature": f, "head": 0, "decoder_share": decoder, "fve": fve, "dfa_share": dfa}
        attribution += [row | {"dfa_distance": distance}, row | {"head": 1, "decoder_share": 1 - decoder}]
    parts = {}
    for name, made in {"features": features, "head_attribution": attribution, "saes": [SAE | sae]}.items():
        parts[name] = [folder / f"{name}.parquet"]
        write_table(parts[name][0], name, to_arrow(name, made))
    path = release.publish(folder / "releases", "r", parts, {}).path
    return open_release(path).sql("SELECT * FROM head_summary ORDER BY head").to_arrow_table().to_pylist()


def test_by_hand_with_ties_and_nulls(tmp_path):
    shares = [(0.1, 0.5, 0.2, 2.0), (0.4, -0.5, 0.2, 9.0), (0.4, 0.5, 0.2, None), (0.9, 1.0, 0.5, 5.0)]
    first, second = publish(tmp_path, shares)
    assert (first["n_features"], first["n_top"], second["n_top"], first["n_dead"]) == (4, 4, 0, 0)
    assert first["effective_features"] == pytest.approx(1.8**2 / (0.01 + 0.16 + 0.16 + 0.81))
    assert first["top10_decoder_share"] == pytest.approx(0.45)
    # Ranks of decoder share 1, 2.5, 2.5, 4; of FVE 2.5, 1, 2.5, 4; of DFA share 2, 2, 2, 4.
    assert first["corr_decoder_fve"] == pytest.approx((1.5 * 0 + 0 + 0 + 1.5 * 1.5) / 4.5)
    assert first["corr_decoder_dfa"] == pytest.approx((1.5 * 0.5 + 1.5 * 1.5) / (4.5 * 3) ** 0.5)
    # A negative FVE weighs nothing; a NULL distance is left out with its weight.
    assert first["distance"] == pytest.approx((0.5 * 2 + 1.0 * 5) / 1.5)
    assert first["bos"] is None
    assert second["corr_fve_dfa"] == pytest.approx(first["corr_fve_dfa"])


def test_too_few_or_equal_values_have_no_correlation(tmp_path):
    equal = publish(tmp_path / "equal", [(0.5, 0.1 * f, 0.3, 1.0) for f in range(4)])[0]
    assert equal["corr_decoder_fve"] is None
    assert equal["corr_fve_dfa"] is None
    two = publish(
        tmp_path / "two", [(0.1 * f, 0.1 * f, 0.3, 1.0) for f in range(4)], (True, True, False, False)
    )[0]
    assert (two["n_features"], two["n_dead"], two["corr_decoder_fve"]) == (2, 2, None)
    assert two["max_decoder_share"] == pytest.approx(0.1)


def test_heads_without_a_living_feature_have_a_row_and_other_saes_none(tmp_path):
    rows = publish(tmp_path / "dead", [(0.5, None, None, None)] * 4, (False,) * 4)
    assert [r["head"] for r in rows] == [0, 1]
    assert (rows[0]["n_features"], rows[0]["effective_features"], rows[0]["max_decoder_share"]) == (
        0,
        0.0,
        None,
    )
    assert publish(tmp_path / "one", [(0.5, 0.1, 0.1, 1.0)] * 4, head=1) == []
    assert publish(tmp_path / "stream", [(0.5, 0.1, 0.1, 1.0)] * 4, site="resid_pre") == []


def test_derived_tables_are_in_the_manifest_and_parts_of_them_are_not_read(tmp_path):
    rows = synthetic_rows(**SIZE)
    assert not set(DERIVED) & set(rows)
    path = build_synthetic_release(tmp_path, **SIZE)
    assert build.read_manifest(path)["head_summary"][0] == 6
    false = open_release(path).sql("SELECT * FROM head_summary").to_arrow_table()
    write_table(tmp_path / "false.parquet", "head_summary", false)
    info = release.publish(tmp_path, "other", {"head_summary": [tmp_path / "false.parquet"]}, {})
    assert build.read_manifest(Path(info.path))["head_summary"][0] == 0


def large(path, threads):
    """head_summary of 200,000 features and 4 heads: many row groups, which DuckDB reads in parallel."""
    connection = duckdb.connect(str(path))
    build._declare(connection)
    connection.register("one", pa.Table.from_pylist([SAE], TABLES["saes"].schema))
    connection.execute("INSERT INTO saes SELECT * FROM one")
    fill = {
        "features": (
            "range(200000) r(feature)",
            {"alive": "true", "top_head": "feature % 4", "density": "0"},
        ),
        "head_attribution": ("range(200000) r(feature), range(4) q(head)", {"head": "head"}),
    }
    for table, (source, known) in fill.items():
        known |= {"sae": "'m/L00.z.topk-4'", "feature": "feature", "quantiles": "NULL"}
        noise = {F32: "hash(feature * 31 + {}) / 18446744073709551616.0"}
        columns = [
            known.get(c.name, noise.get(c.type, "0").format(number))
            for number, c in enumerate(TABLES[table].columns)
        ]
        connection.execute(f"INSERT INTO {table} SELECT {', '.join(columns)} FROM {source}")
    connection.execute(f"SET threads = {threads}")
    derive(connection, "head_summary")
    assert connection.sql("SELECT current_setting('threads')").fetchall() == [(threads,)]
    return connection.sql("SELECT * FROM head_summary").fetchall()


def test_rows_do_not_depend_on_threads(tmp_path):
    """To the last bit: sums of floats would differ if threads shared them out."""
    one = large(tmp_path / "one.duckdb", 1)
    assert len(one) == 4
    assert large(tmp_path / "four.duckdb", 4) == one
