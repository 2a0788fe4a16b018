"""What is left to annotate: the order of the work, how far it is, and notes in and out as files."""

from collections import Counter
from statistics import median
from typing import Any

import pyarrow as pa
import streamlit as st

from app import access, blind, navigation, note_files, state, style, walk, words
from app.colours import SEMANTICITY
from app.head_form import Place
from app.state import Scope
from app.views.atlas import progress_bar
from atlas.db import annotations
from atlas.db.notes import HeadAnnotation
from atlas.db.queues import ORDERS, Head
from atlas.db.vocabulary import same_words
from atlas.judging import semanticity, semanticity_table

SHOWN = 400


def _order() -> tuple[str, int]:
    """The controls of the order; a choice is kept for the head view, and in the address."""
    order, seed = walk.choice()
    st.session_state["queue_order"], st.session_state["queue_seed"] = order, seed

    def chosen() -> None:
        walk.choose(st.session_state["queue_order"] or "layer", int(st.session_state["queue_seed"] or 0))

    one, two, three = st.columns([2.2, 1, 2], vertical_alignment="bottom")
    one.segmented_control(
        "Order", list(ORDERS), key="queue_order", on_change=chosen, required=True, help=_order_help()
    )
    if order == "random":
        two.number_input("Seed", 0, 10**9, key="queue_seed", on_change=chosen, help="the same order for all")
    with three:
        blind.switch()
    walk.write_address()
    return order, seed


def _order_help() -> str:
    return "\n".join(f"- **{name}**: {meaning}" for name, meaning in ORDERS.items())


def _facts(notes: list[HeadAnnotation], n: int) -> None:
    """Progress, and the time that finished heads took."""
    counts = Counter(note.status for note in notes)
    spent = [note.seconds_spent for note in notes if note.status == "done" and note.seconds_spent > 0]
    left = n - counts["done"]
    items = [("done", f"{counts['done']} of {n}"), ("drafts", str(counts["draft"])), ("left", str(left))]
    if spent:
        middle = median(spent)
        items += [
            ("time per head, median", f"{middle / 60:.1f} min"),
            ("in all", f"{sum(spent) / 3600:.1f} h"),
        ]
        items += [("left at this pace", f"{left * middle / 3600:.1f} h")]
    style.facts(items)
    st.html(progress_bar(counts["done"], counts["draft"], n))


def _layers(scope: Scope, notes: list[HeadAnnotation]) -> None:
    done = Counter(note.layer for note in notes if note.status == "done")
    seconds: Counter[int] = Counter()
    for note in notes:
        if note.status == "done":
            seconds[note.layer] += note.seconds_spent  # type: ignore[assignment]
    rows = [
        {
            "layer": layer, "done": done[layer], "of": scope.model.n_heads,
            "minutes per head": seconds[layer] / 60 / done[layer] if done[layer] else None,
        }
        for layer in range(scope.model.n_layers)
    ]  # fmt: skip
    st.dataframe(
        pa.Table.from_pylist(rows), hide_index=True, placeholder="–", height="content", key="queue_layers",
        column_config={"minutes per head": st.column_config.NumberColumn(format="%.1f")},
        alt="Heads done in each layer",
    )  # fmt: skip


def _classes(scope: Scope, notes: list[HeadAnnotation]) -> None:
    """The table of semanticity: as said, and as the verdicts add up."""
    finished = [note for note in notes if note.status == "done"]
    same = same_words(scope.settings, scope.model.model)
    said = semanticity_table(note.semanticity for note in finished)
    told = semanticity_table(semanticity(note.verdicts, same) for note in finished)
    rows = [
        {
            "class": SEMANTICITY[a.semanticity].name, "as said": a.n, "share": a.share if a.of else None,
            "from verdicts": b.n, "share ": b.share if b.of else None,
        }
        for a, b in zip(said, told, strict=True)
    ]  # fmt: skip
    percent = st.column_config.NumberColumn(format="percent")
    st.dataframe(
        pa.Table.from_pylist(rows), hide_index=True, placeholder="–", height="content", key="queue_classes",
        column_config={"share": percent, "share ": percent}, alt="Heads by class of semanticity",
    )  # fmt: skip


def _list(scope: Scope, heads: tuple[Head, ...], notes: list[HeadAnnotation], only: str) -> None:
    mine = {(note.layer, note.head): note for note in notes}
    rows: list[dict[str, Any]] = []
    for number, (layer, head) in enumerate(heads, start=1):
        note = mine.get((layer, head))
        status = note.status if note else "not begun"
        if only in ("all", status):
            rows.append(
                {
                    "place": number, "head": f"L{layer}H{head}", "status": status,
                    "label": note.label if note else "",
                    "minutes": note.seconds_spent / 60 if note else None,
                }
            )  # fmt: skip
    if not rows:
        st.info(f"No head is {only}.")
        return
    chosen = st.dataframe(
        pa.Table.from_pylist(rows[:SHOWN]), hide_index=True, placeholder="–", height=420, on_select="rerun",
        selection_mode="single-row", key=f"queue of {only}",
        column_config={"minutes": st.column_config.NumberColumn(format="%.1f")},
        alt="Heads in the order of the work; ticking one opens it",
    )  # fmt: skip
    if chosen.selection.rows:
        name = rows[chosen.selection.rows[0]]["head"]
        navigation.go(navigation.href("head", model=scope.model.model, head=name))


def _begin(scope: Scope, heads: tuple[Head, ...], notes: list[HeadAnnotation]) -> None:
    done = {(note.layer, note.head) for note in notes if note.status == "done"}
    first = Place(*heads[0], scope.model.n_heads, scope.n_heads_all, heads)
    onward = first if heads[0] not in done else first.next_open(done)
    text = "All heads are done" if len(done) >= len(heads) else f"Go on with {onward.name}"
    if st.button(text, key="queue_begin", type="primary", shortcut="U", icon=":material/play_arrow:"):
        navigation.go(navigation.href("head", model=scope.model.model, head=onward.name))


def render() -> None:
    """The queue of one annotator, and what belongs to all of them."""
    scope = state.scope()
    who = state.annotator(scope.settings)
    style.title("Queue", f"{scope.model.model} · notes by {who}")
    notes = annotations.list_heads(scope.settings, scope.model.model, annotator=who)
    _facts(notes, scope.n_heads_all)
    order, seed = _order()
    heads = walk.walk(scope, order, seed)
    left, right = st.columns([1.6, 1])
    with left:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            _begin(scope, heads, notes)
            only = st.segmented_control(
                "Show", ["all", "not begun", "draft", "done"], default="all", required=True, key="queue_only"
            )
        _list(scope, heads, notes, only)
    with right:
        style.section("Semanticity", "finished heads, as said and as the verdicts add up")
        _classes(scope, notes)
        with st.expander("By layer"):
            _layers(scope, notes)
    if access.can("annotate"):
        words.vocabulary_box(scope, who)
        note_files.files_box(scope, who)
