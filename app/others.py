"""What was agreed on about a head or a feature, and what other annotators wrote; all of it as plain text."""

from collections.abc import Sequence

import streamlit as st

from atlas.db.adjudication import Decision


def agreed(decided: Decision | None, judged: str) -> None:
    """A decision, if there is one, with its judgement in words."""
    if decided is not None:
        said = f"Agreed ({decided.adjudicator}): {decided.label or '–'} ({judged})\n{decided.reason}"
        st.text(said.strip())


def written(notes: Sequence[str]) -> None:
    """Other people's notes, folded away, without their empty lines; nothing where there are none."""
    if not notes:
        return
    with st.expander(f"What others wrote ({len(notes)})"):
        for note in notes:
            st.text("\n".join(line for line in note.split("\n") if line.strip()))
