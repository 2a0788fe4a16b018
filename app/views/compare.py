"""Two heads, or two SAEs, side by side: their numbers, their features, how often features fire."""

import re
from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, families, head_near, head_scatter, navigation, state, style
from app.components import draw
from app.components.payload import Texts
from app.state import Scope
from app.views.atlas import SHORT
from atlas.errors import StoreError
from atlas.store.queries import evidence, features, heads, near, overview, shares
from atlas.store.queries.overview import SaeRef

KINDS = {"heads": "two heads", "saes": "two SAEs"}
METRICS = ("l0", "variance_explained", "ce_recovered", "ce_spliced", "kl", "cosine", "l2_ratio",
           "alive_share", "d_sae", "tokens_trained")  # fmt: skip
_NAME = re.compile(r"L(\d{1,4})H(\d{1,4})")
_NO_DENSITY = "Features that never fire have no place on this axis: "


def _pick(name: str, label: str, options: list[str], default: str, where: Any) -> str:
    """A choice that the address names; StoreError for one that does not exist."""
    asked = st.query_params.get(name, default)
    if asked not in options:
        raise StoreError(f"{label} {asked!r} does not exist here; allowed: {options[0]} to {options[-1]}")
    st.session_state[f"compare_{name}"] = asked

    def changed() -> None:
        st.query_params[name] = st.session_state[f"compare_{name}"]

    return str(where.selectbox(label, options, key=f"compare_{name}", on_change=changed))


def _place(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def number_rows(one: dict[str, Any], other: dict[str, Any], names: dict[str, str]) -> list[dict[str, Any]]:
    """Both sides' numbers and their difference, in the order of the first side's.

    >>> number_rows({"a": 1.0}, {"a": 3.0, "b": 2.0}, {})[0]["difference"]
    2.0
    """
    rows = []
    for name in dict.fromkeys([*one, *other]):
        values = one.get(name), other.get(name)
        both = None not in values
        difference = float(values[1]) - float(values[0]) if both else None  # type: ignore[arg-type]
        told = names.get(name, name.replace("_", " "))
        rows.append({"number": told, "one": values[0], "other": values[1], "difference": difference})
    return rows


def _numbers(rows: list[dict[str, Any]], one: str, other: str) -> None:
    table = pa.table({
        "": [row["number"] for row in rows],
        f"{one} ": pa.array([row["one"] for row in rows], pa.float64()),
        other: pa.array([row["other"] for row in rows], pa.float64()),
        "difference": pa.array([row["difference"] for row in rows], pa.float64()),
    })  # fmt: skip
    config = {name: st.column_config.NumberColumn(format="%.4g") for name in table.column_names[1:]}
    st.dataframe(table, hide_index=True, column_config=config, height=min(700, 40 + 35 * max(1, len(rows))),
                 alt=f"Numbers of {one} and {other}")  # fmt: skip


def _top(scope: Scope, place: tuple[int, int], measure: str) -> dict[str, Any]:
    """A head's ten features of largest share, as a group of links."""
    name, ref = f"L{place[0]}H{place[1]}", scope.z_saes.get(place[0])
    found = () if ref is None else scope.ask(heads.top_features, ref.sae, place[1], measure, 10)
    rows = []
    if ref is not None and found:
        ids = tuple(one.feature for one in found)
        stats, kinds = scope.ask(features.summaries, ref.sae, ids), scope.ask(evidence.families, ref.sae, ids)
        texts = Texts(scope.ask(overview.vocabulary, ref.model))
        for one in found:
            stat = stats[one.feature]
            rows.append({
                "href": navigation.href("feature", sae=ref.sae, feature=one.feature, head=name), "sae": "",
                "feature": one.feature, "label": "", "values": [style.number(getattr(one, measure))],
                "density": stat["density"],
                "token": None if stat["top_token"] is None else texts.text(stat["top_token"]),
                "families": [families.spoken(kind) for kind in kinds.get(one.feature, [])],
            })  # fmt: skip
    columns = [[heads.MEASURES[measure], "of the feature in this head"]]
    return {"title": name, "note": "" if ref is None else ref.sae, "columns": columns, "rows": rows}


def _heads(scope: Scope, left: Any, right: Any) -> None:
    model = scope.model
    names = [f"L{i}H{j}" for i in range(model.n_layers) for j in range(model.n_heads)]
    one = _pick("one", "One head", names, names[0], left)
    other = _pick("other", "The other head", names, names[min(1, len(names) - 1)], right)
    places = _place(one), _place(other)
    measure = st.segmented_control(
        "Top features by", list(heads.MEASURES), default="decoder_share", required=True,
        key="compare_measure", format_func=heads.MEASURES.__getitem__,
    )  # fmt: skip
    groups = [_top(scope, place, str(measure)) for place in places]
    draw.related_features("compared", {"groups": groups, "empty": "Neither head has a feature."})
    if places[0][0] == places[1][0] and one != other:
        _shared(scope, places[0], places[1])
    style.section("Numbers", "scores, and what their features have in common")
    found = [head_near.numbers_of(scope, *place) for place in places]
    _numbers(number_rows(found[0], found[1], SHORT), one, other)


def _shared(scope: Scope, one: tuple[int, int], other: tuple[int, int]) -> None:
    """Heads of one layer write the same features: each feature's decoder share in both."""
    ref = scope.z_saes.get(one[0])
    if ref is None:
        return
    points = scope.ask(shares.in_two_heads, ref.sae, one[1], other[1])
    none = pa.array([False] * points.table.num_rows, pa.bool_())
    names = [f"decoder share in L{layer}H{head}" for layer, head in (one, other)]
    charts.draw(points.table.append_column("chosen", none),
                charts.scatter(("one", names[0]), ("other", names[1])), 260, "shared",
                "Decoder share of features in both heads")  # fmt: skip
    rho = style.number(points.correlations["one", "other"])
    st.caption(f"Rank correlation {rho}. {head_scatter.of_all(points)}")


def _saes(scope: Scope, left: Any, right: Any) -> None:
    refs = {ref.sae: ref for ref in scope.saes if ref.model == scope.model.model}
    names = list(refs)
    one = _pick("sae", "One SAE", names, names[0], left)
    other = _pick("sae2", "The other SAE", names, names[min(1, len(names) - 1)], right)
    rows = {row["sae"]: row for row in scope.ask(overview.sae_table, scope.model.model).to_pylist()}
    found = [
        {name: rows[sae][name] for name in METRICS if rows[sae][name] is not None} for sae in (one, other)
    ]
    style.section("How often features fire", "share of the features, by density")
    _density(scope, list(dict.fromkeys((one, other))))
    style.section("Quality", "on held-out text")
    _numbers(number_rows(found[0], found[1], {}), one, other)
    _families(scope, refs[one], refs[other])


def _density(scope: Scope, saes: list[str]) -> None:
    table = scope.ask(near.densities, tuple(saes))
    rows = table.to_pylist()
    silent = [f"{row['sae']} {row['n']:,}" for row in rows if row["low"] is None]
    shown = [
        {**row, "low": 10 ** row["low"], "high": 10 ** row["high"]} for row in rows if row["low"] is not None
    ]
    if shown:
        charts.draw(pa.Table.from_pylist(shown), charts.densities(saes), 220, "densities",
                    "Share of the features by how often they fire")  # fmt: skip
    if silent:
        st.caption(state.plain(_NO_DENSITY + ", ".join(silent)))


def _families(scope: Scope, one: SaeRef, other: SaeRef) -> None:
    counts = [scope.ask(evidence.family_counts, ref.sae) for ref in (one, other)]
    if any(counts):
        style.section("Families", "how many features belong to each")
        names = {name: families.spoken(name) for found in counts for name in found}
        whole = [{name: found.get(name, 0) for name in names} for found in counts]
        _numbers(number_rows(whole[0], whole[1], names), one.sae, other.sae)


def render() -> None:
    """The choice of what to compare, and both sides."""
    scope = state.scope()
    style.title("Compare", scope.model.model)
    navigation.bound_param("kind", KINDS)
    top, left, right = st.columns([1.4, 2, 2], vertical_alignment="bottom")
    asked = "saes" if {"sae", "sae2"} & set(st.query_params) and "kind" not in st.query_params else None
    if asked and "kind" not in st.session_state:
        st.session_state["kind"] = asked
    default = None if "kind" in st.session_state else "heads"  # Streamlit warns of a default beside a value
    kind = top.segmented_control("Compare", list(KINDS), default=default, required=True, key="kind",
                                 format_func=KINDS.__getitem__, bind="query-params")  # fmt: skip
    if kind == "saes" and not scope.saes:
        st.info("This release has no SAE.")
    elif kind == "saes":
        _saes(scope, left, right)
    else:
        _heads(scope, left, right)
