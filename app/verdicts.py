"""Verdicts on the top features of a head, given key by key, and the class of semanticity they add up to."""

from typing import Any

import streamlit as st

from app.colours import SEMANTICITY
from app.components import draw
from app.components.payload import Texts
from app.notes import Draft
from app.state import Scope, plain
from app.whole import whole
from atlas.db import annotations, vocabulary
from atlas.db.notes import MOST_WORDS, WORD_LENGTH, HeadAnnotation
from atlas.judging import GROUP, ODD, TOP, UNSURE, FeatureVerdict, group_counts, semanticity
from atlas.store.queries import features, heads, overview
from atlas.store.queries.overview import SaeRef


def judged_features(scope: Scope, ref: SaeRef, head: int) -> tuple[int, ...]:
    """The features of a head that are judged: its top ten by the measure that the cards are sorted by."""
    measure = st.session_state.get("measure") or "decoder_share"
    measure = measure if measure in heads.MEASURES else "decoder_share"
    return tuple(one.feature for one in scope.ask(heads.top_features, ref.sae, head, measure, TOP, None))


def _hints(scope: Scope, ref: SaeRef, ids: tuple[int, ...], who: str) -> dict[int, str]:
    """A few words for each feature: one's own label, else the tokens that it promotes most."""
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    found: dict[int, str] = {}
    for row in scope.ask(features.logits, ref.sae, ids, 8).to_pylist():
        if row["sign"] == 1 and row["rank"] < 3:
            found[row["feature"]] = f"{found.get(row['feature'], '')} {texts.text(row['token'])}".strip()
    own = annotations.list_features(scope.settings, ref.sae, annotator=who)
    return {**found, **{note.feature: note.label for note in own if note.label and note.feature in ids}}


def from_browser(sae: str, sent: dict[str, Any], others: list[FeatureVerdict]) -> list[FeatureVerdict]:
    """The verdicts that the component holds, as ``{feature: [verdict, group]}``, after those on other SAEs.

    >>> from_browser("s", {"3": ["group", " of "], "4": ["odd", ""], "5": ["", ""]}, [])
    [FeatureVerdict(sae='s', feature=3, verdict='group', group='of'), \
FeatureVerdict(sae='s', feature=4, verdict='odd', group='')]
    """
    kept = [one for one in others if one.sae != sae or str(one.feature) not in sent]
    for feature, (verdict, group) in sent.items():
        word = " ".join(str(group).split())[:WORD_LENGTH]
        if verdict == GROUP and word:
            kept.append(FeatureVerdict(sae, int(feature), GROUP, word))
        elif verdict in (ODD, UNSURE):
            kept.append(FeatureVerdict(sae, int(feature), verdict))
    return sorted(kept, key=lambda one: (one.sae, one.feature))


@whole
def _take(
    draft: Draft[HeadAnnotation], sae: str, key: str, ids: tuple[int, ...], same: dict[str, str]
) -> None:
    """Keep what the component sent; the class of semanticity follows unless it was chosen otherwise."""
    sent = dict(st.session_state[key].get("verdicts") or {})
    draft.put("echo", sent.pop("seq", 0))
    before = semanticity(draft.get("verdicts") or [], same)
    told = from_browser(sae, {k: v for k, v in sent.items() if k.isdigit()}, draft.get("verdicts") or [])
    groups = dict.fromkeys(one.group for one in told if one.group)
    # A group that no feature belongs to any more leaves the groupings, as it came with its first feature.
    empty = {one.group for one in draft.get("verdicts") or []} - set(groups)
    words = [word for word in draft.get("groupings") or [] if word not in empty]
    draft.put("groupings", list(dict.fromkeys([*words, *groups]))[:MOST_WORDS])
    draft.put("verdicts", told)
    complete = {one.feature for one in told if one.sae == sae} >= set(ids)
    if complete and draft.get("semanticity") in (None, before):
        draft.put("semanticity", semanticity(told, same))
    draft.save()


def follows(draft: Draft[HeadAnnotation]) -> dict[str, Any]:
    """What a finished note holds because of its verdicts, where it was not chosen: the class, and its groups.

    The form shows both as soon as a verdict is given; a browser that sends its older view of the form a
    moment later must not take them away again.
    """
    note = draft.typed()
    words = [one.group for one in note.verdicts if one.group and one.group not in note.groupings]
    found: dict[str, Any] = {}
    if words:
        found["groupings"] = tuple(dict.fromkeys([*note.groupings, *words]))[:MOST_WORDS]
    if note.semanticity is None and len(note.verdicts) >= TOP:
        found["semanticity"] = semanticity(note.verdicts)
    return found


def _sum(told: list[FeatureVerdict], n: int, chosen: str | None, same: dict[str, str]) -> str:
    """What the verdicts add up to, in one line."""
    if not told:
        return "J, K choose a feature; G names a group; ? shows all keys."
    counts = ", ".join(f"{word} {count}/{len(told)}" for word, count in group_counts(told, same))
    of = semanticity(told, same)
    name = SEMANTICITY[of].name
    text = f"{counts or 'no group'}: {name}" if len(told) >= n else f"{len(told)} of {n} judged; {counts}"
    differs = chosen is not None and chosen != of and len(told) >= n
    return f"{text} (you chose {SEMANTICITY[chosen].name})" if differs else text


def verdict_list(draft: Draft[HeadAnnotation], scope: Scope, ref: SaeRef, head: int, who: str) -> None:
    """The list of features with their verdicts; every key press is kept at once."""
    ids = judged_features(scope, ref, head)
    if not ids:
        return
    same = vocabulary.same_words(scope.settings, scope.model.model)
    told: list[FeatureVerdict] = draft.get("verdicts") or []
    hints = _hints(scope, ref, ids, who)
    key = draft.key("judged")
    data = {
        "place": f"L{draft.blank.layer}H{draft.blank.head}",
        "features": [{"feature": one, "hint": hints.get(one, "")} for one in ids],
        "verdicts": {str(v.feature): [v.verdict, v.group] for v in told if v.sae == ref.sae},
        # In the order in which they were named: the number of a group must not change under the fingers.
        "groups": list(dict.fromkeys([*(draft.get("groupings") or []), *(v.group for v in told if v.group)])),
        "known": list(vocabulary.known_groupings(scope.settings, scope.model.model))[:40],
        "echo": draft.get("echo") or 0,
        "fills": draft.get("fills") or 0,
        "longest": WORD_LENGTH,
    }
    draw.verdict_list(key, data, lambda: _take(draft, ref.sae, key, ids, same))
    st.caption(plain(_sum(told, len(ids), draft.get("semanticity"), same)))
