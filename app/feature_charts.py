"""A feature's statistics as facts, and the charts at the top of its view."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, style
from app.components.payload import Texts
from app.feature_evidence import HEIGHT, NAMES, products
from app.state import Scope
from atlas.store.queries import features, overview
from atlas.store.queries.overview import SaeRef

SHARES = {name: key for key, name in NAMES.items() if name in charts.HEAD_MEASURES}
"""The columns of the measures of a head's part, by name."""


def facts(scope: Scope, ref: SaeRef, row: dict[str, Any]) -> None:
    """What a feature's row says, and whether it ever fires."""
    n = style.number
    items = [
        ("density", f"{100 * row['density']:.3g} %"),
        ("active tokens", f"{n(row['n_active'])} of {n(ref.n_tokens)}"),
        ("max activation", n(row["max_activation"])),
        ("mean where active", n(row["mean_activation"])),
        ("median where active", n(row["quantiles"][len(row["quantiles"]) // 2]) if row["quantiles"] else "–"),
        ("encoder norm", n(row["encoder_norm"])),
        ("decoder norm", n(row["decoder_norm"])),
        ("enc · dec cosine", n(row["encoder_decoder_cosine"])),
        ("bias", n(row["bias"])),
    ]
    if row["top_head"] is not None:
        items.append(("largest share in", f"L{ref.layer}H{row['top_head']}"))
    style.facts(items + more_facts(row, scope.ask(overview.vocabulary, ref.model)))
    if not row["alive"]:
        st.warning("This feature never fires in the summarised text, so there are no examples of it.")


def more_facts(row: dict[str, Any], vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Loss effect, positions and commonest token of a feature; what it has not is left out."""
    n = style.number
    items = []
    if row["loss_effect"] is not None:
        items.append(("loss if ablated", f"{row['loss_effect']:+.3g} nats, over {n(row['n_loss'])} tokens"))
    if row["effective_positions"] is not None:
        items.append(("effective positions", n(row["effective_positions"])))
    if row["top_position"] is not None and row["top_position_share"] is not None:
        share = 100 * row["top_position_share"]
        items.append(("commonest position", f"{row['top_position']}, {share:.3g} %"))
    if row["top_token"] is not None and row["top_token_share"] is not None:
        text, share = Texts(vocabulary).text(row["top_token"]), 100 * row["top_token_share"]
        items.append(("commonest token", f"{text}  {share:.3g} %"))
    if row.get("top_previous_token") is not None:
        text, share = Texts(vocabulary).text(row["top_previous_token"]), 100 * row["top_previous_share"]
        items.append(("commonest token before", f"{text}  {share:.3g} %"))
    if row["top_pair_share"] is not None:
        items.append(("commonest pair", f"{100 * row['top_pair_share']:.3g} %"))
    return items


def overview_charts(scope: Scope, ref: SaeRef, number: int) -> None:
    """Activations and positions; beside them the shares of heads or, for q and k, products with positions."""
    with st.container(key="charts"):
        one, two, three = st.columns([1, 1.1, 1.5])
    with one:
        _histogram(scope, ref, number)
    with two:
        style.section("Positions", "in the block")
        where = scope.ask(features.positions, ref.sae, number)
        if where.num_rows:
            context = scope.ask(features.block_length)
            drawn, spec = position_lines(where, context), charts.positions(context - 1)
            charts.draw(drawn, spec, HEIGHT, "positions", "Share of its tokens at each position")
        else:
            st.caption("It never fires.")
    with three:
        if ref.site in ("q", "k"):
            products(scope, ref, number)
        else:
            style.section("Heads", f"of layer {ref.layer}")
            _heads(scope, ref, number)


def _histogram(scope: Scope, ref: SaeRef, number: int) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        style.section("Activations", "where it fires")
        log = st.toggle("log scale", key="log_scale", help="bins of equal ratio from the smallest activation")
    scale = "log" if log else "linear"
    bins = scope.ask(features.histogram, ref.sae, number, scale)
    if not bins.num_rows:
        st.caption("It never fires.")
    elif bins["low"][0] == bins["high"][-1]:
        st.caption(f"All of its activations are {style.number(bins['low'][0].as_py())}.")
    else:
        spec = charts.histogram(scale=scale)
        charts.draw(bins, spec, HEIGHT, f"histogram {scale}", "Histogram of its activations")


def position_lines(where: pa.Table, context: int) -> pa.Table:
    """Long form for the plot: position, name, share, n; zero where it does not fire."""
    found = {row["position"]: row for row in where.to_pylist()}
    series = (
        ("its strongest 2000 tokens", "share_top", "n_top"),
        ("all its tokens", "share_all", "n_active"),
    )
    rows = []
    for name, share, n in series:
        for position in range(context):
            row = found.get(position, {})
            values = {"share": row.get(share) or 0.0, "n": row.get(n) or 0}
            rows.append({"position": position, "name": name, **values})
    return pa.Table.from_pylist(rows)


def _heads(scope: Scope, ref: SaeRef, number: int) -> None:
    shares = scope.ask(features.attribution, ref.sae, number).to_pylist()
    if not shares:
        st.caption("Shares of heads exist for SAEs on the z of a whole layer.")
        return
    rows = [
        {"head": row["head"], "measure": name, "share": row[key]}
        for name, key in SHARES.items()
        for row in shares
        if row[key] is not None
    ]
    present = {row["measure"] for row in rows}
    measures = [name for name in SHARES if name in present]
    alt = f"{', '.join(measures)} of every head"
    charts.draw(pa.Table.from_pylist(rows), charts.by_head(len(shares), measures), HEIGHT, "by_head", alt)
