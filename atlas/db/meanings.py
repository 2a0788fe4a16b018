"""The meanings of the annotation tables' columns, for the reference and for whoever asks in SQL."""

from atlas.db.meanings_reviews import REVIEWS

_HEAD_KEY = {"model": "the model's name", "layer": "layer, from 0", "head": "head, from 0"}
_FEATURE_KEY = {"sae": "the SAE", "feature": "index of the feature in its SAE"}
_SAVED = {
    "annotator": "who wrote it",
    "version": "how often it was saved",
    "created_at": "first saved",
    "updated_at": "last saved",
}

ANNOTATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "head_annotations": (
        "model x layer x head x annotator",
        {
            **_HEAD_KEY,
            **_SAVED,
            "label": "one short line: what the head does",
            "groupings": "the families that its top features fall into, in the annotator's words",
            "semanticity": "how many unrelated things it does; NULL if not judged",
            "confidence": "1 (a guess) to 5 (sure); NULL if not given",
            "role": "a known role, such as induction or previous token",
            "star": "worth showing to others",
            "novel": "a grouping not seen in an earlier head",
            "notes": "free text in Markdown",
            "status": "draft, or done",
            "seconds_spent": "time spent on this head so far",
        },
    ),
    "feature_annotations": (
        "SAE x feature x annotator",
        {
            **_FEATURE_KEY,
            **_SAVED,
            "label": "one short line: what the feature stands for",
            "tags": "the annotator's own words",
            "interpretability": "how well it can be understood; NULL if not judged",
            "notes": "free text in Markdown",
        },
    ),
    "annotation_history": (
        "save of an annotation; never changed afterwards",
        {
            **{name: f"{meaning}; NULL for a feature's" for name, meaning in _HEAD_KEY.items()},
            **{name: f"{meaning}; NULL for a head's" for name, meaning in _FEATURE_KEY.items()},
            "id": "order of the saves",
            "kind": "head or feature",
            "annotator": "who saved",
            "version": "the version that this save made",
            "payload": "everything that was saved, as JSON text",
            "saved_at": "when",
        },
    ),
}
ANNOTATIONS |= REVIEWS
_TIMES = ("created_at", "updated_at", "saved_at", "merged_at", "withdrawn_at", "decided_at", "rated_at")
UNITS = {"seconds_spent": "seconds", **dict.fromkeys(_TIMES, "UTC")}
