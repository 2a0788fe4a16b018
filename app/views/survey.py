"""Interpretability surveys: a random sample of features, judged blind, and the share interpretable."""

import time
from typing import Any

import streamlit as st

from app import access, state, style, survey_results
from app.components import draw
from app.components.payload import Texts, example
from app.state import Scope, plain
from app.token_tables import logit_table
from atlas.db import surveys
from atlas.db.notes import LABEL_LENGTH
from atlas.db.surveys import SKIPPED, SURVEY_NAME, Rating, Survey
from atlas.errors import AtlasError
from atlas.store.queries import examples, features, overview
from atlas.store.queries.overview import SaeRef

CHOICES = {
    "interpretable": ("1", "interpretable"),
    "partly": ("2", "partly"),
    "uninterpretable": ("3", "not interpretable"),
    SKIPPED: ("0", "skip"),
}
SHOWN = 12
LONGEST_PAUSE = 300.0


def alive_features(con: Any, sae: str) -> tuple[int, ...]:
    """The features of an SAE that fire."""
    query = "SELECT feature FROM features WHERE sae = ? AND alive ORDER BY feature"
    return tuple(row[0] for row in con.execute(query, [sae]).fetchall())


def _create(scope: Scope, who: str) -> None:
    chosen = st.session_state["survey_saes"] or []
    try:
        made = surveys.create_survey(
            scope.settings, st.session_state["survey_name"] or "", who, model=scope.model.model,
            release=scope.release.label, alive={sae: scope.ask(alive_features, sae) for sae in chosen},
            n_each=int(st.session_state["survey_n"]), seed=int(st.session_state["survey_seed"]),
        )  # fmt: skip
        st.query_params["survey"] = made.name
        st.session_state["survey_error"] = None
    except AtlasError as error:
        st.session_state["survey_error"] = str(error)


def _new(scope: Scope, who: str, first: bool) -> None:
    with st.expander("New survey", expanded=first, key="survey_new"):
        names = [ref.sae for ref in scope.saes if ref.model == scope.model.model]
        default = [ref.sae for ref in scope.z_saes.values()]
        one, two, three = st.columns([2, 1, 1])
        one.text_input("Name", key="survey_name", max_chars=SURVEY_NAME, placeholder="z SAEs, first look")
        two.number_input("Features of each SAE", 1, 1000, 5, key="survey_n")
        three.number_input(
            "Seed", 0, 10**9, 0, key="survey_seed", help="the same seed draws the same features"
        )
        st.multiselect("SAEs", names, default=default, key="survey_saes")
        st.button("Draw the sample", key="survey_draw", type="primary", on_click=_create, args=(scope, who))
        if error := st.session_state.get("survey_error"):
            st.error(plain(error))


def _rate(scope: Scope, survey: Survey, place: tuple[str, int], rating: str, who: str) -> None:
    began = st.session_state.get("survey_began") or time.monotonic()
    spent = min(LONGEST_PAUSE, time.monotonic() - began)
    label = st.session_state.get(_label_key(survey, place)) or ""
    try:
        surveys.rate(scope.settings, survey, Rating(*place, who, rating, label, spent))
        st.session_state["rate_error"] = None
    except AtlasError as error:
        st.session_state["rate_error"] = str(error)
    st.session_state["survey_began"] = time.monotonic()


def _label_key(survey: Survey, place: tuple[str, int]) -> str:
    return f"survey label {survey.name} {place[0]} {place[1]}"


def card(scope: Scope, ref: SaeRef, feature: int) -> dict[str, Any]:
    """The strongest examples of a feature and some of each tenth, without its name, families or labels."""
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    kept = scope.ask(examples.examples, ref.sae, (feature,), examples.GROUPS, SHOWN)
    stat = scope.ask(features.summaries, ref.sae, (feature,))[feature]
    return {
        "layer": 0, "heads": None, "max": stat["max_activation"], "has_dfa": False, "head_href": "",
        "why_no_dfa": "Which heads made it fire is hidden in a survey.",
        "examples": [{**example(one, texts), "dfa": None} for one in kept], "texts": texts.list,
    }  # fmt: skip


def _judge(scope: Scope, survey: Survey, mine: dict[tuple[str, int], Rating], who: str) -> None:
    """The next feature of the sample that one has not judged."""
    left = [place for place in survey.sample if place not in mine]
    n = len(survey.sample)
    st.progress((n - len(left)) / n, f"{n - len(left)} of {n} judged")
    if not left:
        st.success("You judged every feature of this sample.")
        return
    place = left[0]
    refs = {ref.sae: ref for ref in scope.saes}
    if place[0] not in refs:
        st.warning(f"{plain(place[0])} is not in this release; open release {plain(survey.release)}.")
        return
    style.section(f"Feature {n - len(left) + 1} of {n}", "its SAE, families and labels are hidden")
    st.text_input("Label (optional)", key=_label_key(survey, place), max_chars=LABEL_LENGTH,
                  placeholder="what it stands for, if anything")  # fmt: skip
    for column, (rating, (key, name)) in zip(st.columns(len(CHOICES)), CHOICES.items(), strict=True):
        column.button(
            name, key=f"rate_{rating}", shortcut=key, width="stretch", on_click=_rate,
            args=(scope, survey, place, rating, who), type="tertiary" if rating == SKIPPED else "secondary",
        )  # fmt: skip
    if error := st.session_state.get("rate_error"):
        st.error(plain(error))
    ref = refs[place[0]]
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    logits = scope.ask(features.logits, ref.sae, (place[1],), 10).to_pylist()
    if logits:
        one, two = st.columns(2)
        one.html(logit_table([r for r in logits if r["sign"] == 1], texts, "promotes"))
        two.html(logit_table([r for r in logits if r["sign"] == -1], texts, "suppresses"))
    draw.feature_examples("survey examples", card(scope, ref, place[1]))


def _forget() -> None:
    """A choice replaces the survey that the address named."""
    st.query_params.pop("survey", None)


def render() -> None:
    """Choose or draw a survey, judge its features, see what came out."""
    scope = state.scope()
    who = state.annotator(scope.settings)
    found = surveys.list_surveys(scope.settings, scope.model.model)
    style.title("Survey", f"{scope.model.model} · judged by {who}")
    may = access.can("annotate")
    names = [one.name for one in found]
    if names:
        asked = st.query_params.get("survey")
        if asked in names:
            st.session_state["survey"] = asked
        name = st.selectbox("Survey", names, key="survey", on_change=_forget) or names[0]
        survey = found[names.index(name)]
        st.query_params["survey"] = name
        rated = surveys.ratings(scope.settings, survey.name)
        mine = {(one.sae, one.feature): one for one in rated if one.annotator == who}
        st.caption(plain(
            f"{survey.n_each} features of each of {len(survey.alive)} SAEs of {survey.release}, "
            f"seed {survey.seed}, drawn by {survey.created_by}"
        ))  # fmt: skip
        if may:
            _judge(scope, survey, mine, who)
        if len(mine) == len(survey.sample) or not may:
            survey_results.results(survey, rated)
        else:
            with st.expander("Results so far", key="survey_results", on_change="rerun") as box:
                if box.open:
                    survey_results.results(survey, list(mine.values()))
    if may:
        _new(scope, who, first=not names)
