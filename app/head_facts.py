"""A head before any feature is looked at: its scores, and what its features have in common."""

from typing import Any

from app import families, style
from app.feature_evidence import READS
from app.head_form import Place
from app.head_measures import FACTS
from app.state import Scope
from atlas.store.queries import heads
from atlas.store.reports_heads import FIRST, in_order
from atlas.tables import DFA_SHARES, FAMILY_NAMES

LEAST = 0.005
"""The smallest share that is listed: half a percent."""


def scores(scope: Scope, place: Place) -> None:
    """The scores of a head, each with its rank among all heads of the model."""
    rows = heads.score_rows(scope.ask(heads.head_scores, scope.model.model), place.layer, place.head)
    ref = scope.z_saes.get(place.layer)
    items = [("SAE of this layer's z", ref.sae), ("features", f"{ref.d_sae:,}")] if ref else []
    shown = [row for row in rows if row["score"] in FACTS or row["score"] not in FIRST]
    for row in sorted(shown, key=lambda row: in_order([one["score"] for one in shown]).index(row["score"])):
        rank = "" if row["rank"] is None else f"  #{row['rank']} of {row['of']}"
        items.append((str(row["score"]).replace("_", " "), f"{style.number(row['value'])}{rank}"))
    style.facts(items)


def summary(scope: Scope, place: Place) -> None:
    """What the features of a head have in common; nothing where its layer has no z SAE."""
    ref = scope.z_saes.get(place.layer)
    row = None if ref is None else scope.ask(heads.head_summary, ref.sae, place.head)
    if row is not None:
        style.facts(summary_facts(row))


def summary_facts(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What a ``head_summary`` row says of the features of a head; what it has not is left out."""
    n = style.number
    kinds = [(row[f"n_{name}"], families.spoken(name)) for name in FAMILY_NAMES if row[f"n_{name}"]]
    items = [
        ("features led", f"{n(row['n_top'])} of {n(row['n_features'])} that fire"),
    ]
    if kinds:
        items.append(("of these", ", ".join(f"{n(count)} {name}" for count, name in kinds)))
    items.append(("effective features", n(row["effective_features"])))
    if row["distance"] is not None:
        items.append(("reads from", f"{n(row['distance'])} tokens back"))
    shares = [f"{READS[name]} {100 * row[name]:.0f} %" for name in DFA_SHARES if (row[name] or 0) >= LEAST]
    if shares:
        items.append(("of its positive DFA", ", ".join(shares)))
    pairs = (("decoder, FVE", "corr_decoder_fve"), ("decoder, DFA", "corr_decoder_dfa"),
             ("FVE, DFA", "corr_fve_dfa"))  # fmt: skip
    found = [f"{name} {row[column]:.2f}" for name, column in pairs if row[column] is not None]
    if found:
        items.append(("rank correlations", " · ".join(found)))
    return items
