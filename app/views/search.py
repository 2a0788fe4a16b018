"""Finding features: by token, by the text of examples, by label, by likeness, by family and by any number."""

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import streamlit as st

from app import access, families, saved_view, search_state, state, style
from app.components import draw
from app.search_answers import SCORES, found, result_data, text_of
from app.search_state import QUESTIONS, Asked
from app.state import Scope
from atlas.errors import QueryError
from atlas.store.queries import overview, texts
from atlas.store.queries.search import PAGE, ROLES, Facets, meaning
from atlas.store.queries.search_index import COLUMNS


def _set(name: str, read: Callable[[Any], Any] = lambda value: value) -> Callable[[], None]:
    """A callback that puts a widget's value into the address."""

    def changed() -> None:
        search_state.change(**{name: read(st.session_state[f"search_{name}"])})

    return changed


def _question(asked: Asked) -> None:
    one, two, three, four = st.columns([1.5, 2.7, 1.9, 1.4], vertical_alignment="bottom")
    for name in ("by", "q", "order", "exact"):
        st.session_state[f"search_{name}"] = getattr(asked, name)
    st.session_state["search_order"] = asked.order.removeprefix("-")
    one.selectbox(
        "Look for", list(QUESTIONS), key="search_by", format_func=QUESTIONS.__getitem__, on_change=_set("by")
    )
    hints = {
        "text": "any text",
        "label": "part of a label",
        "like": "SAE/NUMBER",
        "": "choose what to look for",
    }
    two.text_input(
        "Wanted", key="search_q", on_change=_set("q"), disabled=not asked.by, max_chars=400,
        placeholder=hints.get(asked.by, "a token; begin with a space for the one with a space"),
    )  # fmt: skip
    three.selectbox(
        "Order by", ["", *(["score"] if asked.by not in ("", "label") else []), *COLUMNS], key="search_order",
        format_func=lambda name: name.replace("_", " ") or "best first", on_change=_set("order"),
        help="any number that features have; the largest first",
    )  # fmt: skip
    if asked.by == "text":
        four.toggle("Match case", key="search_exact", on_change=_set("exact"))
    else:
        st.session_state["search_up"] = asked.order.startswith("-")
        four.toggle("Smallest first", key="search_up", on_change=_turn, disabled=not asked.order)


def _turn() -> None:
    order = search_state.current().order.removeprefix("-")
    search_state.change(order=f"-{order}" if st.session_state["search_up"] else order)


def _facets(scope: Scope, asked: Asked, facets: Facets) -> None:
    st.session_state["search_families"] = list(asked.families)
    kinds = list(dict.fromkeys([*facets.families, *asked.families]))
    if kinds:
        st.pills(
            "Families", kinds, selection_mode="multi", key="search_families",
            on_change=_set("families", tuple),
            format_func=lambda name: f"{families.spoken(name)} · {facets.families.get(name, 0):,}",
        )  # fmt: skip
    names = [ref.sae for ref in scope.saes if ref.sae in facets.saes or ref.sae == asked.sae]
    st.session_state["search_sae"] = asked.sae
    st.selectbox(
        "SAE", ["", *names], key="search_sae", on_change=_set("sae"),
        format_func=lambda name: f"{name} · {facets.saes.get(name, 0):,}" if name else f"all · {facets.n:,}",
    )  # fmt: skip
    counts: dict[int, int] = {}
    for (_, head), n in facets.heads.items():
        counts[head] = counts.get(head, 0) + n
    heads = sorted({*counts, *([] if asked.head is None else [asked.head])})
    st.session_state["search_head"] = asked.head
    if heads:
        st.selectbox(
            "Head of largest decoder share", heads, index=None, placeholder="any", key="search_head",
            on_change=_set("head"), format_func=lambda head: f"H{head} · {counts.get(head, 0):,}",
        )  # fmt: skip


def _add_range() -> None:
    name = st.session_state["search_range"]
    low, high = (st.session_state.get(f"search_{bound}") for bound in ("low", "high"))
    others = tuple(one for one in search_state.current().ranges if one[0] != name)
    if low is not None and high is not None and low > high:
        low, high = high, low
    search_state.change(ranges=(*others, (name, low, high)))


def _drop_range(name: str) -> None:
    search_state.change(ranges=tuple(one for one in search_state.current().ranges if one[0] != name))


def _ranges(asked: Asked) -> None:
    for name, low, high in asked.ranges:
        bounds = f"{style.number(low)} to {style.number(high)}"
        told = "has a value" if low is None and high is None else bounds
        st.button(
            f"{name.replace('_', ' ')}: {told}", icon=":material/close:", key=f"drop_{name}", type="tertiary",
            on_click=_drop_range, args=(name,), help="take this range away",
        )  # fmt: skip
    with st.popover("Add a range", icon=":material/filter_alt:"):
        name = st.selectbox("Column", list(COLUMNS), key="search_range")
        st.caption(state.plain(meaning(name)))
        one, two = st.columns(2)
        one.number_input("From", value=None, key="search_low", format="%g")
        two.number_input("To", value=None, key="search_high", format="%g")
        st.button("Add", on_click=_add_range, type="primary", key="add_range")


def _pager(asked: Asked, n: int) -> None:
    last = max(0, (n - 1) // PAGE)
    with st.container(horizontal=True, vertical_alignment="center"):
        for name, step, icon, key in (
            ("Previous", -1, ":material/chevron_left:", "P"), ("Next", 1, ":material/chevron_right:", "N"),
        ):  # fmt: skip
            to = asked.page + step
            st.button(
                name, icon=icon, disabled=not 0 <= to <= last, key=f"page_{name}", shortcut=key,
                on_click=search_state.change, kwargs={"page": to},
            )  # fmt: skip
        first = asked.page * PAGE + 1
        st.caption(f"{first:,} to {min(n, first + PAGE - 1):,} of {n:,}" if n else "nothing")


def _open(body: str) -> None:
    search_state.go_to(parse_qs(body))


def _notes(scope: Scope, asked: Asked) -> None:
    """What one should know about how the question was read."""
    if asked.by in ROLES and asked.q:
        tokens = scope.ask(texts.tokens_like, scope.model.model, asked.q)
        vocabulary = scope.ask(overview.vocabulary, scope.model.model)
        if not tokens:
            st.info(
                f"No single token of {state.plain(scope.model.model)} is “{state.plain(asked.q)}”. Longer "
                "text is found under “text of its examples”."
            )
        else:
            st.html(
                "<span class='ha ha-muted'>tokens </span>"
                + " ".join(style.token(vocabulary[t]) for t in tokens[:12])
            )
    if asked.by == "text" and asked.q and not text_of(scope).complete:
        st.caption("The release's text is long: its first four million tokens are looked at.")
    if asked.by == "like" and asked.q:
        st.caption(
            "Likeness: the largest of the cosine of directions, the Jaccard index of firing together, and "
            "the share of the 20 most promoted tokens that both promote."
        )


def render() -> None:
    """The question, the facets, and the features that were found."""
    scope = state.scope()
    asked = search_state.current()
    style.title("Search", "every feature of the release")
    _question(asked)
    try:
        filters, rows, facets = found(scope, asked)
    except QueryError as error:
        state.say_error(error)
        st.button("Begin anew", on_click=search_state.go_to, args=({},), key="anew")
        return
    left, right = st.columns([1, 3.2])
    with left:
        _facets(scope, asked, facets)
        _ranges(asked)
        saved_view.saved_questions("search", asked.address(), _open, can_save=access.can("annotate"))
    with right:
        _notes(scope, asked)
        score = SCORES.get(asked.by) if asked.q else None
        draw.related_features("found", result_data(scope, rows, filters, score))
        _pager(asked, facets.n)
