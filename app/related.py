"""Features that stand near one feature, as what the component of links draws."""

from collections.abc import Sequence
from typing import Any

from app import families, navigation
from app.components.payload import Texts
from app.state import Scope, annotator
from app.style import number
from atlas.db.labels import feature_labels
from atlas.store.queries import evidence, features, overview
from atlas.store.queries.overview import SaeRef

NEAR = {
    ("decoder", "within"): ("Decoder, same SAE", "write in the same direction"),
    ("encoder", "within"): ("Encoder, same SAE", "read the same direction"),
    ("decoder", "across"): ("Decoder, other SAEs", "write in the same direction"),
    ("encoder", "across"): ("Encoder, other SAEs", "read the same direction"),
}
Other = tuple[str, int, list[str]]
"""A feature: its SAE, its number, and the values that its row shows."""


def _rows(
    scope: Scope, ref: SaeRef, others: Sequence[Other], whose: str | None = None
) -> list[dict[str, Any]]:
    """Features with what is known of them; one look-up for each SAE, not for each feature.

    With ``whose`` they have that annotator's labels alone, and no families: for judging blind.
    """
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    by_sae: dict[str, list[int]] = {}
    for sae, feature, _ in others:
        by_sae.setdefault(sae, []).append(feature)
    stats, kinds = {}, {}
    who = whose or annotator(scope.settings)
    labels = feature_labels(scope.settings, by_sae, annotator=who, alone=whose is not None)
    for sae, ids in by_sae.items():
        asked = tuple(sorted(set(ids)))
        stats[sae] = scope.ask(features.summaries, sae, asked)
        kinds[sae] = scope.ask(evidence.families, sae, asked) if whose is None else {}
    rows = []
    for sae, feature, values in others:
        stat = stats[sae].get(feature, {})
        token = stat.get("top_token")
        rows.append(
            {
                "href": navigation.href("feature", sae=sae, feature=feature),
                "sae": "" if sae == ref.sae else sae,
                "feature": feature,
                "label": labels.get((sae, feature), ""),
                "values": values,
                "density": stat.get("density"),
                "token": None if token is None else texts.text(token),
                "families": [families.spoken(one) for one in kinds[sae].get(feature, [])],
            }
        )
    return rows


def related_data(scope: Scope, ref: SaeRef, feature: int, whose: str | None = None) -> dict[str, Any]:
    """Neighbours of a feature by decoder and encoder, and features that fire together with it."""
    groups = []
    near = scope.ask(evidence.neighbours, ref.sae, feature).to_pylist()
    for (direction, scope_of), (title, note) in NEAR.items():
        found: list[Other] = [
            (row["other_sae"], row["other"], [number(row["cosine"])])
            for row in near
            if (row["direction"], row["scope"]) == (direction, scope_of)
        ]
        if found:
            groups.append({"title": title, "note": note, "columns": [["cosine", "of the two directions"]],
                           "rows": _rows(scope, ref, found, whose)})  # fmt: skip
    together = scope.ask(evidence.coactivation, ref.sae, feature).to_pylist()
    if together:
        groups.append(_together(scope, ref, together, whose))
    return {"groups": groups, "empty": "No related feature is kept in this release."}


def _together(scope: Scope, ref: SaeRef, rows: list[dict[str, Any]], whose: str | None) -> dict[str, Any]:
    names = ("n_both", "jaccard", "pearson", "pmi")
    found = [(ref.sae, row["other"], [number(row[name]) for name in names]) for row in rows]
    columns = [
        ["both", "tokens on which both fire"],
        ["Jaccard", "both, of the tokens on which either fires"],
        ["Pearson", "correlation of the two activations"],
        ["PMI", "log of P(both) / (P(one) P(other)), in nats"],
    ]
    counted = f"counted over {number(rows[0]['n_tokens'])} tokens"
    return {"title": "Fires together with", "note": counted, "columns": columns, "wide": True,
            "rows": _rows(scope, ref, found, whose)}  # fmt: skip


def partner_data(
    scope: Scope, ref: SaeRef, other_sae: str, feature: int, whose: str | None = None
) -> dict[str, Any]:
    """The features of the head's other side with the largest product with a q or k feature."""
    found = scope.ask(evidence.qk_partners, ref.sae, other_sae, feature).to_pylist()
    others: list[Other] = [(other_sae, row["other"], [number(row["product"])]) for row in found]
    column = ["product", "dot product of the two decoder rows, unscaled"]
    group: dict[str, Any] = {"title": other_sae, "note": "", "columns": [column], "wide": True,
             "rows": _rows(scope, ref, others, whose)}  # fmt: skip
    for row in group["rows"]:
        row["sae"] = ""
    empty = "No product with a feature of the other side is kept."
    return {"groups": [group] if others else [], "empty": empty}
