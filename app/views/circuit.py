"""The circuit explorer: a prompt, a feature that fires on it, and what made it fire, step by step."""

import html
import json
import shlex
from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, live, navigation, own_text, state, style
from app.circuit_tree import term_rows, tree_html
from app.state import Scope
from atlas.errors import AtlasError, StoreError
from atlas.store.queries import examples, features
from atlas.store.queries.overview import SaeRef
from atlas.store.studies import study_table

NOTE = "recursive direct feature attribution: sources, residual features, components, and on"
LISTED = 12
BREADTHS, DEPTHS = (3, 5, 8, 12), (1, 2, 3, 4, 6)


def _refs(scope: Scope) -> list[SaeRef]:
    """The SAEs that traces go through: attention output and resid_pre of whole layers."""
    known = [r for r in scope.saes if r.model == scope.model.model and r.head is None]
    z = list(scope.z_saes.values())
    others = [r for r in known if r.site in ("attn_out", "resid_pre")]
    return [*z, *others]


def _prompt(scope: Scope) -> dict[str, Any] | None:
    """The text or the block of the address; None before anything was asked."""
    block = navigation.index_param("block", 1 << 31, "block")
    if block is not None:
        end = navigation.index_param("position", 1 << 15, "position")
        found = scope.ask(examples.block_tokens, (block,))
        if block not in found:
            raise StoreError(f"block {block} does not exist in the text of this release")
        return {"text": "", "tokens": list(found[block][0])[: None if end is None else end + 1]}
    text = st.query_params.get("text", "")
    return {"text": text, "tokens": []} if text.strip() else None


def _ask_for_text() -> None:
    st.session_state.setdefault("circuit_words", st.query_params.get("text", "") or own_text.SAMPLE)
    words = st.text_area("Prompt", key="circuit_words", height=80, max_chars=own_text.MOST_CHARACTERS)
    if st.button("Trace", icon=":material/account_tree:", type="primary", key="circuit_go"):
        for key in ("block", "feature", "position"):
            st.query_params.pop(key, None)
        st.query_params["text"] = words


def _position(n: int) -> int:
    """The position of the address, the last one by default."""
    asked = navigation.index_param("position", n, "position")
    return n - 1 if asked is None else asked


def _tokens(texts: list[str], position: int, weights: list[float] | None) -> None:
    """The prompt; each token a link that looks there, coloured by the weight that comes from it."""
    most = max((abs(w) for w in weights or ()), default=0.0) or 1.0
    parts = []
    for at, text in enumerate(texts):
        weight = weights[at] if weights and at < len(weights) else 0.0
        share = abs(weight) / most
        colour = f"rgba({'0,114,178' if weight >= 0 else '213,94,0'},{0.45 * share:.2f})"
        mark = " ha-here" if at == position else ""
        kept = {k: st.query_params[k] for k in ("release", "model", "text", "block") if k in st.query_params}
        where = navigation.href("circuit", **kept, position=at)
        parts.append(
            f"<a class='ha-token{mark}' style='background:{colour}' target='_self' "
            f"href='{html.escape(where, quote=True)}' title='position {at}, weight {weight:+.3g}'>"
            f"{html.escape(text)}</a>"
        )
    st.html(f"<div class='ha-tokens'>{''.join(parts)}</div>")


def _choose(answer: dict[str, Any]) -> None:
    """The features that fire at the position, by layer; a click traces one."""
    rows = [
        {"sae": sae, "feature": feature, "activation": activation}
        for sae, found in answer["saes"].items()
        for feature, activation in found
    ]
    if not rows:
        st.info("No attention feature fires at this token; choose another one.")
        return
    style.section("Features that fire here", "tick one to trace it; click a token to look elsewhere")
    chosen = st.dataframe(
        pa.Table.from_pylist(rows), hide_index=True, height=380, on_select="rerun", key="circuit_rows",
        selection_mode="single-row", alt="Features that fire at the chosen token; ticking one traces it",
        column_config={"activation": st.column_config.NumberColumn(format="%.3f")},
    )  # fmt: skip
    if chosen.selection.rows:
        row = rows[chosen.selection.rows[0]]
        kept = {k: st.query_params[k] for k in ("text", "block") if k in st.query_params}
        navigation.go(
            navigation.href(
                "circuit", **kept, sae=row["sae"], feature=row["feature"], position=answer["position"]
            )
        )


def _heat_map(answer: dict[str, Any], texts: list[str]) -> None:
    rows = [
        {"head": str(head), "source": f"{source:03d} {texts[source]}", "weight": weight}
        for head, weights in zip(answer["heads"], answer["by_head"], strict=True)
        for source, weight in enumerate(weights)
    ]
    most = max((abs(row["weight"]) for row in rows), default=0.0) or 1.0
    spec = {
        "mark": {"type": "rect"},
        "encoding": {
            "x": charts.axis("source", "source position and token", "ordinal", axis={"labelAngle": -60}),
            "y": charts.axis("head", "head", "ordinal", sort=None),
            "color": {"field": "weight", "type": "quantitative", "title": "weight",
                      "scale": {"scheme": "blueorange", "domain": [most, -most]}},
            "tooltip": [{"field": "head"}, {"field": "source"}, *charts.tips(("weight", "weight"))],
        },
    }  # fmt: skip
    charts.draw(pa.Table.from_pylist(rows), spec, 220, "circuit_heads", "Weight by head and source position")


def _facts(trace: dict[str, Any], release: str) -> None:
    root = trace["nodes"][trace["root"]]
    style.facts([
        ("SAE", root["sae"]), ("feature", str(root["feature"])),
        ("at", f"{root['position']} {trace['texts'][root['position']]}"),
        ("pre-activation", style.number(root["value"], 4)),
        ("activation", style.number(root["activation"], 4)), ("nodes", str(len(trace["nodes"]))),
        ("largest remainder", f"{trace['largest_remainder']:.1e}"), ("release", release),
    ])  # fmt: skip


def _downloads(answer: dict[str, Any], scope: Scope, given: dict[str, Any]) -> None:
    trace = answer["trace"]
    name = f"trace-{trace['root']}".replace("@", "-at-")
    with st.container(horizontal=True):
        st.download_button(
            "Trace (JSON)", json.dumps(trace), f"{name}.json", "application/json", key="dl_own"
        )
        st.download_button(
            "Graph (circuit-tracer)", json.dumps(answer["graph"]), f"{name}-graph.json", "application/json",
            key="dl_graph",
        )  # fmt: skip
    if given["text"]:
        root = trace["nodes"][trace["root"]]
        flags = {
            "sae": root["sae"], "feature": root["feature"], "position": root["position"],
            "breadth": trace["settings"]["breadth"], "depth": trace["settings"]["depth"],
            "release": scope.release.label,
        }  # fmt: skip
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        st.code(shlex.join(["atlas", "circuit", "trace", given["text"], *words]), wrap_lines=True)
    with st.expander("All terms as a table", key="circuit_table", on_change="rerun") as box:
        if box.open:
            st.dataframe(
                pa.Table.from_pylist(term_rows(trace)), hide_index=True, height=420, alt="Every term"
            )


def _traced(scope: Scope, given: dict[str, Any], sae: SaeRef, feature: int, position: int) -> None:
    left, middle, right = st.columns([1, 1, 3], vertical_alignment="bottom")
    breadth = left.selectbox("Terms of a node", BREADTHS, index=1, key="circuit_breadth")
    depth = middle.selectbox("Attention steps", DEPTHS, index=2, key="circuit_depth")
    residual = right.toggle("through residual features, where SAEs exist", value=True, key="circuit_residual")
    bounds = {"breadth": breadth, "depth": depth, "nodes": 300, "residual": residual}
    asked = {**given, "sae": sae.sae, "feature": feature, "position": position, "bounds": bounds}
    with st.spinner("Tracing"):
        answer = live.ask(scope, "circuit_trace", asked)
    trace = answer["trace"]
    _facts(trace, scope.release.label)
    _tokens(trace["texts"], position, trace["nodes"][trace["root"]]["by_position"])
    style.section("What it is made of", "each line is a term of the line it stands under; unfold to go on")
    kept = {k: st.query_params[k] for k in ("release", "model", "text", "block") if k in st.query_params}
    st.html(tree_html(trace, 1, **kept))
    style.section("By head and source", "weights of the traced feature; they and a constant sum to it")
    _heat_map(answer, trace["texts"])
    _downloads(answer, scope, given)


def _paths(scope: Scope) -> None:
    """Strong paths that a scan found, as a way in."""
    rows = study_table(scope.settings, "circuit_paths")
    names = {ref.sae for ref in scope.saes}
    own = [row for row in rows.to_pylist() if row["sae"] in names]
    style.section("Paths found by scans", "atlas circuit scan; tick one to trace its strongest case")
    if not own:
        st.caption("No scan has been made with these SAEs yet. This command makes one:")
        st.code(f"atlas circuit scan --release {scope.release.name}", language="bash")
        return
    own = sorted(own, key=lambda row: -row["n"] * row["mean_share"])[:200]
    percent = st.column_config.NumberColumn(format="percent")
    shown = ["sae", "feature", "up_sae", "up_feature", "n", "n_seen", "mean_share", "max_share", "head"]
    chosen = st.dataframe(
        pa.Table.from_pylist([{key: row[key] for key in shown} for row in own]), hide_index=True, height=320,
        on_select="rerun", selection_mode="single-row", key="circuit_paths", alt="Paths found by scans",
        column_config=dict.fromkeys(("mean_share", "max_share"), percent),
    )  # fmt: skip
    if chosen.selection.rows:
        row = own[chosen.selection.rows[0]]
        navigation.go(navigation.href("circuit", block=row["block"], position=row["position"],
                                      sae=row["sae"], feature=row["feature"]))  # fmt: skip


def render() -> None:
    """The prompt, the features that fire on it, or one of them traced."""
    scope = state.scope()
    style.title("Circuits", NOTE)
    refs = _refs(scope)
    if not any(ref.site in ("z", "attn_out") for ref in refs):
        st.info("This release has no SAE on z or attn_out of a whole layer, so there is nothing to trace.")
        return
    live.warm(scope, refs)
    _ask_for_text()
    prompt = _prompt(scope)
    if prompt is None:
        st.caption("Trace runs the model over the prompt and shows the features that fire on its last token.")
        _paths(scope)
        return
    given = {"model": live.model_of(scope, scope.model.model), "saes": live.saes_of(scope, refs), **prompt}
    try:
        if "feature" in st.query_params and "sae" in st.query_params:
            sae = features.find_sae(scope.saes, st.query_params["sae"])
            number = navigation.index_param("feature", sae.d_sae, f"feature of {sae.sae}")
            at = navigation.index_param("position", 1 << 15, "position")
            _traced(scope, given, sae, number or 0, -1 if at is None else at)
            return
        asked = navigation.index_param("position", 1 << 15, "position")
        with st.spinner("Asking the model"):
            where = {"position": -1 if asked is None else asked, "k": LISTED}
            answer = live.ask(scope, "circuit_firing", {**given, **where})
        _tokens(answer["texts"], answer["position"], None)
        _choose(answer)
    except AtlasError as error:
        state.say_error(error)
