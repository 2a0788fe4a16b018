"""The parts of the feature view that show evidence beyond where the feature fires."""

from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, evidence_charts, style
from app.components import draw
from app.components.payload import Texts
from app.related import partner_data, related_data
from app.state import Scope
from app.token_tables import logit_table, source_table
from atlas.store.queries import evidence, features, overview
from atlas.store.queries.overview import SaeRef
from atlas.tables import DFA_SHARES, TABLES

HEIGHT = 150
READS = {
    "bos": "BOS", "current": "the token itself", "previous": "the token before", "same_token": "its copies",
    "after_match": "after its copies", "local": "1 to 8 back", "long_range": "over 32 back",
}  # fmt: skip
"""Shares of positive DFA as the chart names them; the long meaning is its tooltip."""
MOMENTS = ("mean", "std", "skew", "kurtosis")
ROUNDING = 1e-6
NAMES = {
    "decoder_share": "decoder share", "fve": "FVE", "fve_active": "FVE where active",
    "dfa_share": "DFA share", "logit_share": "logit share", "dfa_distance": "tokens back",
}  # fmt: skip


def share_rows(summary: dict[str, Any]) -> pa.Table:
    """The shares of a ``dfa_summary`` row that are known, for the chart: name (and share), meaning, share."""
    told = {column.name: column.meaning for column in TABLES["dfa_summary"].columns}
    rows = [
        {"name": f"{name}  {100 * summary[column]:.0f} %", "meaning": told[column], "share": summary[column]}
        for column, name in READS.items()
        if summary[column] is not None
    ]
    schema = pa.schema([("name", pa.string()), ("meaning", pa.string()), ("share", pa.float64())])
    return pa.Table.from_pylist(rows, schema=schema)


def distance_rows(bins: pa.Table) -> tuple[pa.Table, list[str]]:
    """The bins of ``dfa_distances`` for the chart, negative shares below zero; and their labels in order."""
    rows, labels = [], []
    for row in bins.to_pylist():
        low, high = row["low"], row["high"]
        label = "BOS" if low < 0 else str(low) if low == high else f"{low}–{high}"
        labels.append(label)
        rows.append({"bin": label, "kind": "for", "value": row["share"]})
        rows.append({"bin": label, "kind": "against", "value": -row["negative"]})
    return pa.Table.from_pylist(rows), labels


def reads(scope: Scope, ref: SaeRef, feature: int) -> None:
    """Where the feature's positive DFA comes from; nothing for SAEs without DFA."""
    summary = scope.ask(evidence.dfa_summary, ref.sae, feature)
    if summary is None or not summary["n"]:
        return
    n = style.number
    beside = f"positive DFA over its {n(summary['n'])} strongest examples"
    if summary["distance"] is not None:
        beside += f" · {n(summary['distance'])} tokens back on average, BOS left out"
    if summary["matched"]:
        beside += f" · in {100 * summary['matched']:.0f} % the strongest source follows a copy of the token"
        beside += f", {n(summary['matched_prefix'])} repeated tokens on average"
    style.section("Where it reads from", beside)
    with st.container(key="charts-reads"):
        one, two, three = st.columns([1, 1.2, 1])
    with one:
        data = share_rows(summary)
        charts.draw(data, evidence_charts.shares(data["name"].to_pylist()), HEIGHT + 20, "reads",
                    "Shares of its positive DFA by kind of source; they overlap")  # fmt: skip
    with two:
        bins = scope.ask(evidence.dfa_distances, ref.sae, feature)
        if bins.num_rows:
            data, labels = distance_rows(bins)
            charts.draw(data, evidence_charts.distances(labels), HEIGHT + 20, "distances",
                        "Its DFA by distance to the source")  # fmt: skip
    with three:
        texts = Texts(scope.ask(overview.vocabulary, ref.model))
        st.html(source_table(scope.ask(evidence.dfa_tokens, ref.sae, feature).to_pylist(), texts))


def products(scope: Scope, ref: SaeRef, feature: int) -> None:
    """The products of a q or k feature with positions, as they are or centred."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        style.section("Products with positions", f"decoder row · W_pos W_{(ref.site or '').upper()}")
        centred = st.toggle("centred", key="centred", help="the mean over positions taken out of W_pos")
    found = scope.ask(evidence.position_products, ref.sae, feature)
    if not found.num_rows:
        st.caption("The model adds no learned position embedding to its input, or no product is kept.")
        return
    column = "centred" if centred else "product"
    data = pa.table({"position": found["position"], "product": found[column]})
    charts.draw(data, evidence_charts.products("product, centred" if centred else "product"), HEIGHT,
                "products", "Product of the feature with every position")  # fmt: skip


def partners(scope: Scope, ref: SaeRef, feature: int, whose: str | None = None) -> None:
    """The best partners of a q or k feature on the other side of its head."""
    sides = scope.ask(evidence.other_sides, ref.sae)
    if not sides:
        st.caption("It has no direct effect on the logits, and no partners on the other side of a head.")
        return
    side = "keys that it looks for" if ref.site == "q" else "queries that look for it"
    style.section("Partners", side)
    other = sides[0]
    if len(sides) > 1:
        other = st.selectbox("SAE of the other side", sides, key="other side", width=360)
    draw.related_features("partners", partner_data(scope, ref, other, feature, whose))


def writes(scope: Scope, ref: SaeRef, feature: int, row: dict[str, Any]) -> None:
    """Every logit effect as a histogram, and what its two strongest heads write; nothing for q and k."""
    if ref.site in ("q", "k"):
        return
    with st.expander(
        "What it writes: all logit effects, and by head", key="writes", on_change="rerun"
    ) as box:
        if not box.open:
            return
        bins = scope.ask(evidence.logit_histogram, ref.sae, feature)
        if not bins.num_rows:
            st.caption("No logit effects are kept for this SAE: it writes nothing into the residual stream.")
            return
        with st.container(key="charts-writes"):
            one, *others = st.columns([1.35, 1, 1, 1, 1])
        with one:
            charts.draw(bins, charts.histogram("logit effect"), HEIGHT, "logit_histogram",
                        "Histogram of its logit effects over the vocabulary")  # fmt: skip
            style.facts([(name, _moment(row[f"logit_{name}"])) for name in MOMENTS])
        texts = Texts(scope.ask(overview.vocabulary, ref.model))
        effects = scope.ask(evidence.head_logit_effects, ref.sae, feature).to_pylist()
        pairs = sorted({(effect["head"], -effect["sign"]) for effect in effects})
        for column, (head, sign) in zip(others, pairs, strict=False):
            some = [effect for effect in effects if (effect["head"], -effect["sign"]) == (head, sign)]
            does = "promotes" if sign < 0 else "suppresses"
            column.html(logit_table(some, texts, f"L{ref.layer}H{head} {does}"))


def _moment(value: float | None) -> str:
    """A moment of the logit effects; what is left of a mean that was taken out is zero."""
    return style.number(value if value is None or abs(value) > ROUNDING else 0)


def by_head(scope: Scope, ref: SaeRef, feature: int) -> None:
    """Every number of ``head_attribution`` as a table; nothing where the SAE has none."""
    if ref.site != "z" or ref.head is not None:
        return
    with st.expander("Heads in numbers: shares, and where each head reads from", key="by head",
                     on_change="rerun") as box:  # fmt: skip
        if not box.open:
            return
        shares = scope.ask(features.attribution, ref.sae, feature)
        if not shares.num_rows:
            st.caption("No shares of heads are kept for this feature.")
            return
        config = {}
        for column in TABLES["head_attribution"].columns:
            plain = column.name in ("head", "dfa_distance")
            name = NAMES.get(column.name) or (
                f"reads {READS[column.name[4:]]}" if column.name[4:] in DFA_SHARES else column.name
            )
            config[column.name] = st.column_config.NumberColumn(
                name, help=column.meaning, format="%.3g" if plain else "percent"
            )
        st.dataframe(shares, column_config=config, hide_index=True, alt="Shares of every head")


def related(scope: Scope, ref: SaeRef, feature: int, whose: str | None) -> None:
    """Neighbours and features that fire together, each a link; with one annotator's labels or (None) all."""
    with st.expander("Related features: neighbours, and what fires together with it", key="related",
                     on_change="rerun") as box:  # fmt: skip
        if box.open:
            draw.related_features("related features", related_data(scope, ref, feature, whose))
