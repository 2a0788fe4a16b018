"""The IOI page: what spliced SAEs keep, which features the task needs, which pairs make the scores."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from app import charts, navigation, state, style
from app.colours import BLUE, GREEN, ORANGE, RED
from app.state import Scope
from atlas.store.queries.overview import SaeRef
from atlas.store.studies import study_table

ORDERS = ("all", "ABBA", "BABA")
NOTE = "indirect object identification: logit of IO minus logit of S, in nats"
TOP = 40
COLUMNS: dict[str, Any] = {
    "sae": "SAE", "n": "prompts", "n_active": "fires on",
    "effect": st.column_config.NumberColumn("drop, nats", format="%.5f"),
    "path_effect": st.column_config.NumberColumn("drop by the receivers' values", format="%.5f"),
    "top_head": st.column_config.NumberColumn("head that makes most of it", format="H%d"),
    "top_head_share": st.column_config.NumberColumn("its share", format="percent"),
}  # fmt: skip


def part_name(feature: int) -> str:
    """A part of an activation by its number in the tables.

    >>> part_name(12), part_name(-1), part_name(-2)
    ('12', 'error', 'constant')
    """
    return {-1: "error", -2: "constant"}.get(feature, str(feature))


def _study(scope: Scope) -> dict[str, Any] | None:
    """The study that the address names, else the first of this model; None where there is none."""
    known = [row for row in study_table(scope.settings, "studies").to_pylist() if row["kind"] == "ioi"]
    known = [row for row in known if row["model"] == scope.model.model]
    if not known:
        st.info(
            f"No IOI study of {state.plain(scope.model.model)} has been made yet. This command makes one:"
        )
        st.code(f"atlas ioi --release {scope.release.name}", language="bash")
        return None
    names = [row["study"] for row in known]
    asked = st.query_params.get("study")
    if asked in names and "ioi_study" not in st.session_state:
        st.session_state["ioi_study"] = asked
    if st.session_state.get("ioi_study") not in names:
        st.session_state["ioi_study"] = names[0]
    chosen = st.selectbox("Study", names, key="ioi_study") if len(names) > 1 else names[0]
    st.query_params["study"] = chosen
    return known[names.index(chosen)]


def _rows(scope: Scope, table: str, study: str, prompts: str | None) -> pa.Table:
    rows = study_table(scope.settings, table)
    rows = rows.filter(pc.equal(rows["study"], study)).drop_columns(["study"])
    return rows if prompts is None else rows.filter(pc.equal(rows["prompts"], prompts))


def _bars(fields: tuple[tuple[str, str, str], ...], unit: str, category: str) -> charts.Spec:
    names = [name for _, name, _ in fields]
    return {
        "mark": {"type": "bar", "cornerRadiusEnd": 1},
        "encoding": {
            "x": charts.axis(category, "", "ordinal", sort=None, axis={"labelAngle": -45, "labelLimit": 110,
                                                                           "labelOverlap": False}),
            "xOffset": {"field": "name", "sort": names},
            "y": charts.axis("value", unit),
            "color": {"field": "name", "type": "nominal", "sort": names, "title": None,
                      "legend": charts.LEGEND,
                      "scale": {"domain": names, "range": [colour for *_, colour in fields]}},
            "tooltip": [{"field": category}, {"field": "name", "title": "of"}, *charts.tips(("value", unit))],
        },
    }  # fmt: skip


def _draw(
    rows: pa.Table, fields: tuple[tuple[str, str, str], ...], unit: str, category: str, key: str, alt: str
) -> None:
    long = [
        {category: row[category], "name": name, "value": row[field]}
        for row in rows.to_pylist()
        for field, name, _ in fields
        if row[field] is not None
    ]
    if long:
        charts.draw(pa.Table.from_pylist(long), _bars(fields, unit, category), 210, key, alt)


def _splices(rows: pa.Table) -> None:
    style.section("SAEs without error terms in the model", "each alone, then groups of layers together")
    short = [part.rpartition("/")[2] for part in rows["part"].to_pylist()]
    rows = rows.set_column(rows.column_names.index("part"), "part", pa.array(short, pa.string()))
    rows = rows.append_column("single", pa.array([len(one) == 1 for one in rows["layers"].to_pylist()]))
    rows = rows.sort_by([("single", "descending"), ("part", "ascending")])
    left, right = st.columns(2)
    with left:
        _draw(rows, (("logit_diff_clean", "clean", GREEN), ("logit_diff_spliced", "spliced", BLUE),
                     ("logit_diff_mean", "mean over ABC", ORANGE)), "logit difference", "part", "ioi_splice",
              "Logit difference with each SAE spliced in, and with mean ablation")  # fmt: skip
    with right:
        _draw(rows, (("kl_spliced", "spliced", BLUE), ("kl_mean", "mean over ABC", ORANGE)), "KL, nats",
              "part", "ioi_kl", "KL with each SAE spliced in, and with mean ablation")  # fmt: skip
    _table(rows.drop_columns(["prompts", "single"]), "ioi_splice_table", "Spliced SAEs in numbers")


def _table(rows: pa.Table, key: str, alt: str) -> None:
    with st.expander("The numbers", key=f"open_{key}", on_change="rerun") as box:
        if box.open:
            st.dataframe(rows, hide_index=True, key=key, alt=alt)


def _features(scope: Scope, rows: pa.Table) -> None:
    style.section(
        "Features at S2", "drop of the logit difference when one is zero; tick one to open its page"
    )
    if not rows.num_rows:
        return
    rows = rows.sort_by([("effect", "descending"), ("feature", "ascending")])
    known = {ref.sae: ref for ref in scope.saes}
    shown = rows.slice(0, TOP)
    names = [f"{_layer(known, row['sae'])} {part_name(row['feature'])}" for row in shown.to_pylist()]
    drawn = shown.append_column("part", pa.array(names, pa.string()))
    _draw(drawn, (("effect", "zero at S2", BLUE), ("path_effect", "in the receivers' values alone", RED)),
          "drop, nats", "part", "ioi_features", "Effect of zero-ablating each feature at S2")  # fmt: skip
    parts = pa.array(map(part_name, rows["feature"].to_pylist()), pa.string())
    told = rows.drop_columns(["prompts"])
    told = told.set_column(told.column_names.index("feature"), "feature", parts)
    chosen = st.dataframe(
        told, hide_index=True, height=320, key="ioi_feature_rows", placeholder="–", column_config=COLUMNS,
        on_select="rerun", selection_mode="single-row", alt="Features at S2; ticking one opens its page",
    )  # fmt: skip
    if chosen.selection.rows:
        row = rows.slice(chosen.selection.rows[0], 1).to_pylist()[0]
        if row["feature"] >= 0 and row["sae"] in known:
            navigation.go(navigation.href("feature", sae=row["sae"], feature=row["feature"]))
        st.info("The error term has no page, and SAEs of other releases have theirs there.")


def _layer(known: dict[str, SaeRef], sae: str) -> str:
    return f"L{known[sae].layer}" if sae in known else sae.rpartition("/")[2]


def _noise(rows: pa.Table) -> None:
    style.section("Attention outputs at S2 from other prompts", "share of the logit difference that is kept")
    fields = (("kept_position", "against zero at S2", BLUE), ("kept_all", "against zero everywhere", ORANGE))
    _draw(rows, fields, "kept", "experiment", "ioi_noise", "Kept logit difference by experiment")
    _table(rows.drop_columns(["prompts"]), "ioi_noise_table", "Noising in numbers")


def _qk(pairs: pa.Table, explained: pa.Table) -> None:
    style.section(
        "Scores of movers to the second name", "attention features x residual features, mean over prompts"
    )
    if not pairs.num_rows:
        st.caption("The release has no residual SAE before a mover's layer, so that no score was split.")
        return
    routes = explained.sort_by([("pairs_explain", "descending"), ("route", "ascending")])["route"].to_pylist()
    route = st.selectbox("Path", routes, key="ioi_route", help="attention layer > via head > mover head")
    rows = pairs.filter(pc.equal(pairs["route"], route)).to_pylist()
    rows = [{**row, "query": part_name(row["feature"]), "key": part_name(row["key_feature"])} for row in rows]
    most = max((abs(row["mean"]) for row in rows), default=0.0) or 1.0
    spec = {
        "mark": {"type": "rect"},
        "encoding": {
            "x": charts.axis("key", "residual feature at the name", "nominal"),
            "y": charts.axis("query", "attention feature at S2", "nominal"),
            "color": {"field": "mean", "type": "quantitative", "title": "mean",
                      "scale": {"scheme": "blueorange", "domain": [most, -most]}},
            "tooltip": [{"field": "query", "title": "attention"}, {"field": "key", "title": "residual"},
                        *charts.tips(("mean", "mean"), ("mean_abs", "mean magnitude"))],
        },
    }  # fmt: skip
    charts.draw(pa.Table.from_pylist(rows), spec, 300, "ioi_qk", "Mean parts of the score by pair")
    one = explained.filter(pc.equal(explained["route"], route)).to_pylist()[0]
    style.facts([
        ("mean score", style.number(one["score"])),
        ("without constants", style.number(one["score_features"])),
        (f"variance that {one['n_pairs']} pairs explain", style.number(one["pairs_explain"])),
        ("variance that error terms explain", style.number(one["errors_explain"])),
    ])  # fmt: skip
    _table(explained.drop_columns(["prompts"]), "ioi_qk_table", "Paths in numbers")


def render() -> None:
    """A study's tables, drawn."""
    scope = state.scope()
    style.title("IOI", NOTE)
    study = _study(scope)
    if study is None:
        return
    st.code(study["command"], language="bash")
    prompts = st.segmented_control(
        "Prompts", ORDERS, default="all", required=True, key="ioi_prompts", label_visibility="collapsed"
    )
    name, which = study["study"], str(prompts)
    heads = _rows(scope, "ioi_heads", name, None).to_pylist()
    style.facts([
        ("model", study["model"]), ("release", study["release"]), ("made", study["created"][:16]),
        *((role, ", ".join(f"L{h['layer']}H{h['head']}" for h in heads if h["role"] == role))
          for role in ("receiver", "mover")),
    ])  # fmt: skip
    if '"substitute_names": true' in study["settings"]:
        st.caption(
            "Few first names are single tokens of this model; other capitalised words stand for names."
        )
    _splices(_rows(scope, "ioi_splice", name, which))
    _features(scope, _rows(scope, "ioi_features", name, which))
    _noise(_rows(scope, "ioi_noise", name, which))
    _qk(_rows(scope, "qk_pairs", name, which), _rows(scope, "qk_explained", name, which))
