"""The meanings of the columns in which verdicts, comments, agreed verdicts and surveys lie."""

_HEAD_KEY = {"model": "the model's name", "layer": "layer, from 0", "head": "head, from 0"}
_FEATURE_KEY = {"sae": "the SAE", "feature": "index of the feature in its SAE"}
_PLACE = {
    "id": "order in which they came",
    "kind": "head or feature",
    **{name: f"{meaning}; NULL for a feature's" for name, meaning in _HEAD_KEY.items()},
    **{name: f"{meaning}; NULL for a head's" for name, meaning in _FEATURE_KEY.items()},
}

REVIEWS: dict[str, tuple[str, dict[str, str]]] = {
    "head_verdicts": (
        "model x layer x head x annotator x SAE x feature",
        {
            **_HEAD_KEY,
            **_FEATURE_KEY,
            "annotator": "who judged",
            "status": "of the note about the head: draft, or done",
            "verdict": "group (belongs to a group), odd (odd one out) or unsure (cannot say)",
            "grouping": "the group that it belongs to, as written; empty for odd and unsure",
        },
    ),
    "grouping_merges": (
        "model x word that was merged",
        {
            "model": "the model's name",
            "word": "a word for a grouping, as people wrote it",
            "stands_for": "the word that it counts as",
            "merged_by": "who merged it",
            "merged_at": "when",
        },
    ),
    "comments": (
        "comment on a head or a feature",
        {
            **_PLACE,
            "author": "who said it",
            "body": "the text; empty where it was withdrawn",
            "created_at": "when",
            "withdrawn_at": "when its author took it back; NULL if not",
        },
    ),
    "adjudications": (
        "decision on a head or a feature; the one with the largest version holds",
        {
            **_PLACE,
            "adjudicator": "who decided",
            "label": "what was agreed that it does",
            "groupings": "the agreed groupings",
            "semanticity": "the agreed class; NULL if none",
            "role": "the agreed role",
            "interpretability": "the agreed rating of a feature; NULL if none",
            "reason": "why",
            "version": "1 for the first decision on it",
            "decided_at": "when",
        },
    ),
    "survey_features": (
        "survey x SAE x feature of its sample",
        {
            **_FEATURE_KEY,
            "survey": "the survey's name",
            "model": "the model's name",
            "release": "the release that the sample was drawn from",
            "position": "place in the order in which features are shown, from 0",
            "alive": "how many features of this SAE fire: what the sample stands for",
        },
    ),
    "survey_ratings": (
        "survey x SAE x feature x annotator",
        {
            **_FEATURE_KEY,
            "survey": "the survey's name",
            "annotator": "who judged",
            "rating": "interpretable, partly, uninterpretable or skipped",
            "label": "what it stands for, if anything",
            "seconds_spent": "time until it was judged",
            "version": "how often it was judged",
            "rated_at": "when",
        },
    ),
}
