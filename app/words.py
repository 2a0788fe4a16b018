"""The vocabulary of groupings: which words are in use, which may mean the same, and merging them."""

import pyarrow as pa
import streamlit as st

from app.state import Scope, plain
from atlas.db import vocabulary
from atlas.errors import AtlasError

SUGGESTED = 5


def _merge(scope: Scope, word: str, other: str, who: str) -> None:
    try:
        vocabulary.merge(scope.settings, scope.model.model, word, other, who)
        st.session_state["merge_error"] = None
    except AtlasError as error:
        st.session_state["merge_error"] = str(error)


def _unmerge(scope: Scope, word: str, who: str) -> None:
    vocabulary.unmerge(scope.settings, scope.model.model, word, who)


def _merge_chosen(scope: Scope, who: str) -> None:
    word, other = st.session_state.get("merge_word"), st.session_state.get("merge_into")
    if word and other:
        _merge(scope, word, other, who)


def vocabulary_box(scope: Scope, who: str) -> None:
    """Words with their counts, pairs that look alike, and merges with the way back."""
    with st.expander("Vocabulary of groupings", key="words", on_change="rerun") as box:
        if not box.open:
            return
        words = vocabulary.vocabulary(scope.settings, scope.model.model)
        if not words:
            st.caption("No grouping is in use yet.")
            return
        names = tuple(one.word for one in words)
        left, right = st.columns([1, 1.2])
        with left:
            rows = [{"grouping": w.word, "notes": w.n, "merged": ", ".join(w.merged)} for w in words]
            st.dataframe(pa.Table.from_pylist(rows), hide_index=True, height=240, key="words_table",
                         alt="Groupings in use")  # fmt: skip
        with right:
            st.caption("A merged word counts as the other one everywhere. What people wrote stays as it is.")
            for word, other in vocabulary.alike(names)[:SUGGESTED]:
                st.button(
                    f"Merge {plain(word)} into {plain(other)}", key=f"alike {word}", type="tertiary",
                    on_click=_merge, args=(scope, word, other, who),
                )  # fmt: skip
            one, two, three = st.columns([1, 1, 0.5], vertical_alignment="bottom")
            one.selectbox("Word", names, index=None, key="merge_word")
            two.selectbox("stands for", names, index=None, key="merge_into", accept_new_options=True)
            three.button("Merge", key="merge", on_click=_merge_chosen, args=(scope, who))
            if error := st.session_state.get("merge_error"):
                st.error(plain(error))
            for word, other in vocabulary.same_words(scope.settings, scope.model.model).items():
                st.button(
                    f"Take back: {plain(word)} stands for {plain(other)}", key=f"unmerge {word}",
                    type="tertiary", on_click=_unmerge, args=(scope, word, who),
                )  # fmt: skip
