"""What came out of a survey: shares with their intervals, by SAE and in all, and how far raters agree."""

from collections.abc import Sequence

import pyarrow as pa
import streamlit as st

from app import style
from atlas.db.surveys import Rating, Survey, shares, survey_alpha


def results_table(survey: Survey, rated: Sequence[Rating]) -> pa.Table:
    """One row per SAE, the one for all of them last."""
    return pa.Table.from_pylist(
        [
            {
                "SAE": one.sae or "all, by their firing features", "judged": one.n,
                "interpretable": one.counts.get("interpretable", 0), "partly": one.counts.get("partly", 0),
                "not": one.counts.get("uninterpretable", 0),
                "share": one.share, "low": one.low, "high": one.high,
            }
            for one in shares(survey, rated)
        ]
    )  # fmt: skip


def results(survey: Survey, rated: Sequence[Rating]) -> None:
    """The table of shares, and the agreement of several raters."""
    table = results_table(survey, rated)
    if not table.num_rows:
        st.info("No feature is judged yet.")
        return
    last = table.to_pylist()[-1]
    alpha = survey_alpha(rated)
    style.facts(
        [
            ("interpretable", f"{100 * last['share']:.0f}%"),
            ("95% interval (Wilson)", f"{100 * last['low']:.0f} to {100 * last['high']:.0f}%"),
            ("features judged", str(last["judged"])),
            ("raters", str(len({one.annotator for one in rated}))),
            ("Krippendorff's alpha", style.number(None if alpha != alpha else alpha)),
        ]
    )
    percent = st.column_config.NumberColumn(format="percent")
    st.dataframe(
        table, hide_index=True, placeholder="–", height="content", key="survey_table",
        column_config={"share": percent, "low": percent, "high": percent},
        alt="Share of features judged interpretable, by SAE, with 95% intervals",
    )  # fmt: skip
