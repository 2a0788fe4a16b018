"""``atlas report`` against SQL written here and against the rows of the synthetic release."""

import csv
import importlib.util
import io
import json
import re
import sys

import pytest
from click.testing import CliRunner

from atlas.cli import cli
from atlas.cli.report import KINDS
from atlas.errors import AtlasError
from atlas.settings import load_settings
from atlas.store.connection import cursor, open_release
from tests.synthetic import build_synthetic_release

SIZE = {"n_layers": 2, "n_heads": 2, "d_sae": 32, "n_blocks": 8, "context": 16}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    build_synthetic_release(folder / "releases", "full", engine=True, **SIZE)
    return folder


@pytest.fixture
def con(home, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    return cursor(open_release(home / "releases" / "full" / "full-v0001.duckdb"))


def report(*words):
    result = CliRunner().invoke(cli, ["report", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def tables(text):
    """{title: rows of cells} of Markdown."""
    found = {}
    for title, body in re.findall(r"### (.+?)\n\n((?:\|.*\n)+)", text):
        lines = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body.splitlines()]
        assert all(re.fullmatch(r"-+:?", cell) for cell in lines[1])
        found[title] = [lines[0], *lines[2:]]
    return found


def test_layers_in_the_form_of_d1(con):
    found = tables(report("layers"))
    assert set(found) == {"attn_out by layer", "mlp_out by layer", "z by layer"}
    for site, letter in (("attn_out", "A"), ("mlp_out", "M"), ("z", "Z")):
        head, *rows = found[f"{site} by layer"]
        assert head == ["Layer", "Var. explained", "L0", "CE score", "CE loss"]
        wanted = con.execute(
            "SELECT layer, variance_explained, m.l0, ce_recovered, ce_spliced, ce_clean FROM saes s "
            "JOIN sae_metrics m USING (sae) WHERE split = 'eval' AND site = ? ORDER BY layer", [site],
        ).fetchall()  # fmt: skip
        for cells, (layer, explained, l0, score, loss, _) in zip(rows[:-1], wanted, strict=True):
            assert cells == [
                f"L{layer}{letter}",
                f"{explained:.2%}",
                f"{l0:.2f}",
                f"{score:.2%}",
                f"{loss:.4f}",
            ]
        assert rows[-1] == ["Original", "", "", "", f"{wanted[0][-1]:.4f}"]


def test_heads_are_the_same_numbers_in_boxes(con):
    """Seed 000's boxes: a column for queries and one for keys, a row per metric."""
    head, *rows = tables(report("qk"))["q and k of single heads"]
    boxes = tables(report("heads"))
    for row in rows:
        values = dict(zip(head, row, strict=True))
        kind = values["SAE"].split(".q.")[-1].split(".k.")[-1]
        box = boxes[f"{values['Head']}, {kind}"]
        assert box[0] == ["Metric", "Query", "Key"]
        column = box[0].index(values["Side"])
        metrics = {line[0]: line[column] for line in box[1:]}
        for metric in ("L0 norm", "Recovered loss", "# Alive features", "# Features"):
            assert metrics[metric] == values[metric]


def test_qk_in_the_form_of_a1(con):
    head, *rows = tables(report("qk"))["q and k of single heads"]
    wanted = con.execute(
        "SELECT s.layer, s.head, s.site, s.sae, m.l0, m.ce_recovered, m.alive, s.d_sae, s.l1_coefficient "
        "FROM saes s JOIN sae_metrics m ON m.sae = s.sae AND m.split = 'eval' WHERE site IN ('q', 'k')"
    ).fetchall()
    assert len(rows) == len(wanted)
    by_sae = {row[head.index("SAE")]: dict(zip(head, row, strict=True)) for row in rows}
    for layer, number, site, sae, l0, recovered, alive, d_sae, l1 in wanted:
        row = by_sae[sae]
        assert (row["Head"], row["Side"]) == (f"L{layer}H{number}", {"q": "Query", "k": "Key"}[site])
        assert row["L0 norm"] == f"{l0:.1f}"
        assert row["Recovered loss"] == f"{recovered:.1%}"
        assert (row["# Alive features"], row["# Features"]) == (str(alive), str(d_sae))
        assert float(row["L1 coefficient"]) == pytest.approx(l1)
    assert "k" not in head, "no architecture here keeps k features"


def test_sweep_has_a_row_per_sae(con):
    head, *rows = tables(report("sweep"))["Sweep"]
    assert len(rows) == 12
    for cells in rows:
        row = dict(zip(head, cells, strict=True))
        l0, dead = con.execute(
            "SELECT m.l0, m.dead / s.d_sae FROM saes s JOIN sae_metrics m USING (sae) "
            "WHERE s.sae = ? AND split = 'eval'", [row["SAE"]],
        ).fetchone()  # fmt: skip
        assert (row["L0"], row["Dead"]) == (f"{l0:.2f}", f"{dead:.1%}")


def test_pruning_in_the_form_of_d2(con):
    head, *rows = tables(report("pruning"))["Pruning"]
    assert head[:4] == ["Layer", "Max act < 1", "Norm < 0.99", "Sparsity < 1e-06"]
    wanted = con.execute(
        "SELECT n_weak, n_short, n_rare, n_pruned, n_features FROM pruning ORDER BY sae"
    ).fetchall()
    for cells, row in zip(rows[:-1], wanted, strict=True):
        assert tuple(int(c) for c in (*cells[1:4], *cells[-3:-1])) == row
    mean = sum(row[3] / row[4] for row in wanted) / len(wanted)
    assert rows[-1] == ["Mean", *[""] * (len(head) - 2), f"{mean:.1%}"]


def test_stages_show_before_and_after(con):
    head, *rows = tables(report("stages"))["Stages"]
    at = head.index("L2 ratio pruned")
    wanted = con.execute(
        "SELECT l2_ratio FROM sae_stages WHERE stage = 'pruned' AND split = 'eval' ORDER BY sae"
    ).fetchall()
    assert [cells[at] for cells in rows[:-1]] == [f"{ratio:.2%}" for (ratio,) in wanted]
    assert rows[-1][at] == f"{sum(r for (r,) in wanted) / len(wanted):.2%}"


def test_training_ends_with_the_last_step(con):
    head, *rows = tables(report("training"))["Training"]
    (n,) = con.execute("SELECT count(*) FROM saes").fetchone()
    assert len(rows) == n
    assert {cells[head.index("Tokens")] for cells in rows} == {"100,000"}


@pytest.mark.parametrize("kind", KINDS)
def test_csv_holds_every_row_in_full_precision(con, kind):
    rows = list(csv.DictReader(io.StringIO(report(kind, "--format", "csv"))))
    shown = sum(len(t) - 1 for t in tables(report(kind)).values())
    feet = {"layers": 3, "pruning": 1, "stages": 1}.get(kind, 0)
    assert len(rows) == shown - feet
    if kind == "layers":
        (value,) = con.execute(
            "SELECT variance_explained FROM sae_metrics WHERE sae = ? AND split = 'eval'", [rows[0]["sae"]]
        ).fetchone()
        assert float(rows[0]["variance_explained"]) == value


@pytest.mark.parametrize("kind", ["sweep", "training"])
def test_figures_in_every_format(con, tmp_path, kind):
    pytest.importorskip("vl_convert")
    for ending, begins in ((".svg", b"<svg"), (".png", b"\x89PNG"), (".html", b"<!DOCTYPE html>")):
        path = tmp_path / f"figure{ending}"
        report(kind, "--figure", str(path))
        assert path.read_bytes().lstrip().startswith(begins)
    html = (tmp_path / "figure.html").read_text("utf8")
    (n,) = con.execute("SELECT count(*) FROM training_log").fetchone()
    assert html.count('"dead_fraction":') + html.count('"dead_fraction": ') >= (12 if kind == "sweep" else n)


def test_without_the_converter_html_is_drawn_and_svg_refused(con, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "vl_convert" else real(n, *a))
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    report("sweep", "--figure", str(tmp_path / "a.html"))
    assert json.dumps("dead_share") in (tmp_path / "a.html").read_text("utf8")
    with pytest.raises(AtlasError, match=r"vl-convert-python is missing, which [.]svg needs"):
        report("sweep", "--figure", str(tmp_path / "a.svg"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["layers", "--figure", "a.svg"], "layers has no figure; allowed: sweep, training"),
        (["sweep", "--figure", "a.pdf"], "names no format; allowed: .html, .svg, .png"),
        (["sweep", "--release", "gone"], "'gone'"),
        (["sweep", "--model", "gpt9"], "model 'gpt9' is not known; allowed: synthetic"),
        (["sweep", "--figure", "/dev/null/a.html"], "/dev/null"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(con, words, said):
    with pytest.raises(AtlasError) as error:
        report(*words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_release_without_such_rows_says_what_it_lacks(tmp_path):
    build_synthetic_release(load_settings().releases, "small", **SIZE)
    with pytest.raises(AtlasError, match="'small@1' has no site with several SAEs of one architecture"):
        report("sweep")


def ranks(values):
    """Average ranks, by counting."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def correlation(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    over = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return over / (sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)) ** 0.5


def test_families_beside_attention_scores(con):
    found = tables(report("families"))
    assert set(found) == {"Heads by their features", "Features against attention"}
    heads = con.execute("SELECT layer, head, n_top, n_single_token FROM head_summary ORDER BY ALL").fetchall()
    rows = found["Heads by their features"][1:]
    assert [row[:2] for row in rows] == [[f"L{layer}H{head}", str(n)] for layer, head, n, _ in heads]
    for row, (*_, n) in zip(rows, heads, strict=True):
        assert (f"single token {n}" in row[2]) == (n > 0) or row[2].count(",") == 2
    title, *lines = found["Features against attention"]
    assert title[:4] == ["Evidence by features", "Attention score", "Heads", "Rank correlation"]
    wanted = [("previous", "previous_token"), ("same_token", "duplicate"), ("same_token", "duplicate_text"),
              ("after_match", "induction"), ("after_match", "induction_text")]  # fmt: skip
    stored = {score for (score,) in con.execute("SELECT DISTINCT score FROM head_scores").fetchall()}
    assert {"previous_token", "duplicate", "induction"} <= stored
    for (share, score), line in zip([p for p in wanted if p[1] in stored], lines, strict=True):
        pairs = con.execute(
            f"SELECT h.{share} / (1 - h.bos), s.value FROM head_summary h JOIN head_scores s"
            " ON (s.model, s.layer, s.head) = (h.model, h.layer, h.head) WHERE s.score = ?", [score],
        ).fetchall()  # fmt: skip
        assert line[:3] == [share, score, str(len(pairs))]
        expected = correlation(ranks([a for a, _ in pairs]), ranks([b for _, b in pairs]))
        assert float(line[3]) == pytest.approx(expected, abs=6e-4)
        (best,) = [a for a, b in pairs if b == max(b for _, b in pairs)]
        others = [a for a, b in pairs if b != max(b for _, b in pairs)]
        won = sum((best > a) + 0.5 * (best == a) for a in others) / len(others)
        assert float(line[4]) == pytest.approx(won, abs=6e-4)
