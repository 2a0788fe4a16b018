"""What a feature's saved card says beside its examples."""

import re
from typing import Any

from app import families, navigation, style
from app.components.payload import Texts, rounded
from app.feature_evidence import NAMES
from app.state import Scope
from atlas.store.queries import evidence, features, overview
from atlas.store.queries.overview import SaeRef

SHOWN = 10
"""Tokens that it promotes or suppresses, and heads, that a card lists."""


def _tokens(scope: Scope, ref: SaeRef, number: int, sign: int) -> list[list[Any]]:
    """The tokens with the largest logit effects of a sign: text and effect."""
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    rows = scope.ask(features.logits, ref.sae, (number,), 20).to_pylist()
    found = [row for row in rows if row["sign"] == sign][:SHOWN]
    return [[texts.text(row["token"]), rounded(row["value"])] for row in found]


def _heads(scope: Scope, ref: SaeRef, number: int) -> list[dict[str, Any]]:
    """The heads with the largest decoder shares, with every measure of theirs; empty where there are none."""
    rows = scope.ask(features.attribution, ref.sae, number).to_pylist()
    largest = sorted(rows, key=lambda row: (-(row["decoder_share"] or 0.0), row["head"]))[:SHOWN]
    return [
        {"head": f"L{ref.layer}H{row['head']}", **{name: rounded(row.get(name)) for name in NAMES}}
        for row in largest
    ]


def card(scope: Scope, ref: SaeRef, number: int, row: dict[str, Any], hidden: bool) -> dict[str, Any]:
    """What a saved card holds; its link names the version of the release. ``hidden``: without families."""
    release = f"{scope.release.name}@{scope.release.version}"
    link = navigation.href("feature", release=release, sae=ref.sae, feature=number)
    kinds = [] if hidden else scope.ask(evidence.families, ref.sae, (number,)).get(number, [])
    said = [
        ("fires on", f"{style.number(row['n_active'])} tokens"),
        ("density", style.number(row["density"])),
        ("largest activation", style.number(row["max_activation"])),
        ("families", "hidden" if hidden else ", ".join(map(families.spoken, kinds)) or "none"),
    ]
    return {
        "title": f"{ref.sae}, feature {number}",
        "file": re.sub(r"[^A-Za-z0-9._-]+", "_", f"{ref.sae}-{number}"),
        "facts": [list(one) for one in said],
        "about": {
            "release": release, "model": ref.model, "sae": ref.sae, "feature": number, "layer": ref.layer,
            "density": rounded(row["density"]), "n_active": row["n_active"],
            "max_activation": rounded(row["max_activation"]), "families": None if hidden else list(kinds),
        },
        "promotes": _tokens(scope, ref, number, 1),
        "suppresses": _tokens(scope, ref, number, -1),
        "heads": _heads(scope, ref, number),
        "href": link,
        "link": f"Head Atlas, release {release}: {link}",
    }  # fmt: skip
