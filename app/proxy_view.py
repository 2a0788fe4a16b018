"""A guess about one feature, tested: specificity, expected value, sensitivity, what it gets wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, live, navigation, proxy_charts, state, style
from app.components import draw
from app.components.payload import Texts, example
from app.search_answers import text_of
from app.state import Scope
from app.whole import Newer
from atlas.errors import AtlasError, QueryError
from atlas.store import proxies
from atlas.store.proxies import Bin, Counts, Truth
from atlas.store.queries import examples, features, overview
from atlas.store.queries.examples import Example
from atlas.store.queries.overview import SaeRef
from atlas.store.sandbox import run_sql

KINDS = {"proxy": "regular expression", "proxysql": "SQL condition"}
HINTS = {
    "proxy": r"such as  return$ , \bself\. or (?i)mr(?= )",
    "proxysql": "such as  token = '·the' AND previous LIKE '%of'",
}
TENTHS = tuple(f"q{n}" for n in range(10))
SIZES = (64, 256, 1024)
"""Blocks of text that can be measured."""
AT_ONCE = 8_000
"""Tokens of one live call."""
SHOWN = 10


@dataclass(frozen=True)
class Guess:
    """A proxy as it was written: its kind (the address's name for it) and its text."""

    kind: str
    text: str


def _truth(scope: Scope, guess: Guess, blocks: Sequence[int]) -> Truth:
    """Where the guess holds in some blocks; QueryError says what is wrong with it."""
    if guess.kind == "proxy":
        return proxies.pattern_truth(text_of(scope), guess.text, blocks)
    settings, sql = scope.settings, proxies.predicate_sql(guess.text, blocks)
    found = run_sql(
        sql, scope.release.path, {}, seconds=settings.query_seconds, memory=settings.query_memory,
        rows=2_000_000, cancel=Newer(),
    )  # fmt: skip
    if found.truncated:
        raise QueryError("the condition holds on more tokens than can be counted; ask for less")
    columns = (found.table[name].to_pylist() for name in ("block", "position"))
    return proxies.rows_truth(zip(*columns, strict=True), blocks)


def _kept(scope: Scope, ref: SaeRef, feature: int) -> tuple[Example, ...]:
    groups = (*TENTHS, "top", "random", "negative")
    return scope.ask(examples.examples, ref.sae, (feature,), groups, 20)


def tenths_of(kept: Sequence[Example], truth: Truth, quantiles: Sequence[float]) -> list[Bin]:
    """The kept examples of each tenth of the firing tokens, split by whether the guess holds."""
    samples: dict[int, list[tuple[float, bool]]] = {}
    for one in kept:
        if one.group in TENTHS:
            holds = one.position in truth.get(one.block, frozenset())
            samples.setdefault(int(one.group[1]), []).append((one.activation, holds))
    return proxies.by_tenth(samples, quantiles)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def _plots(bins: Sequence[Bin], key: str, unit: str) -> None:
    rows = proxy_charts.rows(bins)
    if not rows:
        return
    one, two = st.columns(2)
    with one:
        st.caption("Specificity: where it fires this strongly, how often does the guess hold? Bars: 95 %")
        charts.draw(pa.Table.from_pylist(rows), proxy_charts.specificity(unit), 180, f"{key}_spec",
                    "Specificity of the guess by activation")  # fmt: skip
    with two:
        st.caption("Expected value: how much of its activation lies where the guess holds?")
        table = pa.Table.from_pylist(proxy_charts.mass_rows(bins))
        charts.draw(table, proxy_charts.expected_value(unit), 180, f"{key}_mass",
                    "Activation where the guess holds and where not")  # fmt: skip


def _wrong(ref: SaeRef, listed: list[dict[str, Any]], texts: Texts, top: float) -> None:
    if not listed:
        st.caption("No kept example contradicts the guess.")
        return
    data = {
        "layer": ref.layer, "heads": None if ref.head is None else [ref.head], "max": top,
        "why_no_dfa": "No direct feature attribution is kept for this token.", "has_dfa": True,
        "head_href": navigation.href("head", model=ref.model) + f"&head=L{ref.layer}HHEAD",
        "examples": listed, "texts": texts.list,
    }  # fmt: skip
    draw.feature_examples("proxy examples", data)


def false_positives(kept: Sequence[Example], truth: Truth, texts: Texts) -> list[dict[str, Any]]:
    """Kept examples on which it fires though the guess does not hold, strongest first, each token once."""
    wrong = {
        (one.block, one.position): one
        for one in kept
        if one.near_miss is None and one.position not in truth.get(one.block, frozenset())
    }
    strongest = sorted(wrong.values(), key=lambda one: (-one.activation, one.block, one.position))[:SHOWN]
    return [{**example(one, texts), "g": "fp", "r": rank} for rank, one in enumerate(strongest)]


def _from_tables(scope: Scope, ref: SaeRef, feature: int, guess: Guess) -> None:
    """What the kept examples say, at once."""
    kept = _kept(scope, ref, feature)
    blocks = sorted({one.block for one in kept})
    truth = _truth(scope, guess, blocks)
    row = scope.ask(features.feature_row, ref.sae, feature)
    bins = tenths_of(kept, truth, row["quantiles"] or [0.0] * 11)
    precision, mass = proxies.over_tenths(bins)
    top = [one.position in truth.get(one.block, frozenset()) for one in kept if one.group == "top"]
    n = sum(one.counts.n_fires for one in bins)
    style.facts([
        ("precision, estimated", _share(precision)), ("of its activation, estimated", _share(mass)),
        ("top examples on which it holds", f"{sum(top)} of {len(top)}"),
        ("estimated from", f"{n} examples, drawn from the tenths of its firing tokens"),
    ])  # fmt: skip
    _plots(bins, "kept", "activation (tenths of its firing tokens)")
    st.caption("False positives: it fires, the guess does not hold")
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    _wrong(ref, false_positives(kept, truth, texts), texts, row["max_activation"])


def _measure(
    scope: Scope, ref: SaeRef, feature: int, blocks: dict[int, tuple[int, ...]]
) -> dict[int, list[tuple[int, float]]]:
    """Where the feature fires in whole blocks, by live calls of a few thousand tokens each."""
    (sae,) = live.saes_of(scope, [ref])
    asked = {"model": live.model_of(scope, ref.model), "sae": sae, "feature": feature}
    ids = sorted(blocks)
    step = max(1, AT_ONCE // max(len(tokens) for tokens in blocks.values()))
    active: dict[int, list[tuple[int, float]]] = {}
    bar = st.progress(0.0, text="Asking the model")
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        answer = live.ask(
            scope, "feature_on_blocks", {**asked, "blocks": [list(blocks[block]) for block in some]}
        )
        for block, found in zip(some, answer["active"], strict=True):
            active[block] = [(position, value) for position, value in found]
        bar.progress(min(1.0, (start + step) / len(ids)), text="Asking the model")
    bar.empty()
    return active


def false_negatives(
    active: dict[int, list[tuple[int, float]]], blocks: dict[int, tuple[int, ...]], truth: Truth, texts: Texts
) -> list[dict[str, Any]]:
    """The first tokens of the text on which the guess holds and the feature is silent."""
    listed: list[dict[str, Any]] = []
    for block in sorted(blocks):
        fires = {position for position, _ in active[block]}
        for position in sorted(truth[block] - fires - {0}):
            if len(listed) == SHOWN:
                return listed
            listed.append(
                {"g": "fn", "r": len(listed), "b": block, "p": position, "a": 0.0, "miss": 0.0, "s": "",
                 "t": [texts.place(token) for token in blocks[block]],
                 "act": [list(one) for one in active[block]], "dfa": None}
            )  # fmt: skip
    return listed


def _facts(counts: Counts) -> None:
    n = counts.n_true
    style.facts([
        ("precision", _share(counts.precision)), ("sensitivity", _share(counts.sensitivity)),
        ("of its activation", _share(counts.mass_share)), ("the guess holds on", _share(counts.base_rate)),
        ("counted", f"{counts.n_tokens:,} tokens: it fires on {counts.n_fires:,}, the guess holds on {n:,}, "
                    f"both on {counts.n_both:,}"),
    ])  # fmt: skip


def _on_text(scope: Scope, ref: SaeRef, feature: int, guess: Guess, n_blocks: int) -> None:
    """Measured on whole blocks: sensitivity and false negatives need silent tokens, too."""
    blocks = {
        block: tokens
        for block, (tokens, _) in scope.ask(examples.block_tokens, tuple(range(n_blocks))).items()
    }
    active = _measure(scope, ref, feature, blocks)
    truth = _truth(scope, guess, sorted(blocks))
    truth = {block: truth.get(block, frozenset()) for block in blocks}
    counts = proxies.counts_of_text(active, {block: len(tokens) for block, tokens in blocks.items()}, truth)
    _facts(counts)
    firings = [
        (value, position in truth[block]) for block, some in active.items() for position, value in some
    ]
    _plots(proxies.by_activation(firings), "text", "activation")
    st.caption(f"False negatives: the guess holds, it is silent (the first {SHOWN})")
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    listed = false_negatives(active, blocks, truth, texts)
    _wrong(ref, listed, texts, max((value for value, _ in firings), default=1.0))


def _asked() -> Guess | None:
    for kind in KINDS:
        if st.query_params.get(kind):
            return Guess(kind, st.query_params[kind])
    return None


def _ask() -> None:
    kind = st.session_state["proxy_kind"]
    for name in KINDS:
        st.query_params.pop(name, None)
    if st.session_state["proxy_text"]:
        st.query_params[kind] = st.session_state["proxy_text"]


def test_guess(scope: Scope, ref: SaeRef, feature: int) -> None:
    """A field for the guess, and what the tables or the model say of it."""
    guess = _asked()
    with st.expander("Test a guess: does it fire where you think?", key="proxy_box", on_change="rerun",
                     expanded=guess is not None) as box:  # fmt: skip
        if not box.open:
            return
        st.session_state.setdefault("proxy_kind", guess.kind if guess else "proxy")
        st.session_state.setdefault("proxy_text", guess.text if guess else "")
        one, two, three = st.columns([1.6, 2.6, 2.2], vertical_alignment="bottom")
        kind = str(one.segmented_control(
            "The guess is a", list(KINDS), key="proxy_kind", format_func=KINDS.__getitem__, required=True,
            on_change=_ask,
        ))  # fmt: skip
        two.text_input("Guess", key="proxy_text", on_change=_ask, placeholder=HINTS[kind], max_chars=2000,
                       help="It holds at the token in which a match ends. SQL: token, previous, next, "
                            "position, block, source.")  # fmt: skip
        size = three.segmented_control(
            "Measured on", [0, *SIZES], key="proxy_size", default=0, required=True,
            format_func=lambda n: f"{n} blocks" if n else "examples",
        )  # fmt: skip
        if guess is None:
            st.caption("Write what you think it fires on; the plots tell how often that is so.")
            return
        try:
            if size:
                _on_text(scope, ref, feature, guess, size)
            else:
                _from_tables(scope, ref, feature, guess)
        except AtlasError as error:
            state.say_error(error)
