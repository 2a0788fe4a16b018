"""Checks that what a row refers to exists: SAEs, features, heads, tokens, blocks, models."""

from atlas.store.checks.check import Check, grouped, rows
from atlas.tables import TABLES, Table

_TRAINING = ("training_watched",)
"""Tables about features of SAEs that need not have been analysed."""
_ANALYSED = "(SELECT sae, d_sae FROM saes WHERE sae IN (SELECT DISTINCT sae FROM features))"
_SHAPES = "(SELECT s.sae, m.* FROM saes s JOIN models m USING (model))"


def _names(declared: Table) -> set[str]:
    return {column.name for column in declared.columns}


def _features() -> list[Check]:
    """Rows about features: the SAE exists, was analysed, and has that many features."""
    found = []
    for name, declared in TABLES.items():
        if {"sae", "feature"} <= _names(declared):
            saes = f"{_ANALYSED} s" if name not in _TRAINING else "saes s"
            meaning = "its SAE exists, and the feature is one of its d_sae"
            source = f"{name} LEFT JOIN {saes} USING (sae)"
            offends = "s.d_sae IS NULL OR feature < 0 OR feature >= s.d_sae"
            found.append(rows(f"{name}.feature", meaning, offends, "sae || ' ' || feature", source))
        elif "sae" in declared.key and name != "saes":
            meaning = "its SAE exists"
            found.append(rows(f"{name}.sae", meaning, "sae NOT IN (SELECT sae FROM saes)", "sae"))
    return found


def _models() -> list[Check]:
    offends = "model NOT IN (SELECT model FROM models)"
    return [
        rows(f"{name}.model", "its model exists", offends, "model")
        for name, declared in TABLES.items()
        if "model" in _names(declared) and name != "models"
    ]


def _heads() -> list[Check]:
    """Rows about heads: there are that many layers and heads in the model."""
    found = []
    columns = {"top_head": ("features", "dfa"), "head": ("head_attribution", "head_logit_effects")}
    for column, tables in columns.items():
        for name in tables:
            source = f"{name} LEFT JOIN {_SHAPES} s USING (sae)"
            offends = f"{column} IS NOT NULL AND NOT coalesce({column} BETWEEN 0 AND s.n_heads - 1, false)"
            found.append(rows(f"{name}.{column}", "the model has that head", offends, column, source))
    own = [name for name, t in TABLES.items() if t.key[:3] == ("model", "layer", "head")]
    for name in ("saes", *own):
        source = f"{name} LEFT JOIN models m USING (model)"
        offends = (
            "NOT coalesce(layer BETWEEN 0 AND m.n_layers - 1, false) "
            "OR (head IS NOT NULL AND NOT coalesce(head BETWEEN 0 AND m.n_heads - 1, false))"
        )
        what = "'L' || layer || coalesce('H' || head, '')"
        found.append(rows(f"{name}.head", "the model has that layer and head", offends, what, source))
    return found


def _tokens() -> list[Check]:
    columns = (
        ("token_stats", "token"), ("logit_effects", "token"), ("head_logit_effects", "token"),
        ("dfa_tokens", "token"), ("features", "top_token"), ("features", "top_previous_token"),
    )  # fmt: skip
    found = []
    for name, column in columns:
        source = f"{name} LEFT JOIN {_SHAPES} s USING (sae)"
        offends = f"{column} IS NOT NULL AND NOT coalesce({column} BETWEEN 0 AND s.d_vocab - 1, false)"
        found.append(
            rows(f"{name}.{column}", "the token is in the model's vocabulary", offends, column, source)
        )
    return found


def _others() -> list[Check]:
    """The other feature of a pair."""
    found = []
    for name, sae in (("neighbours", "other_sae"), ("qk_partners", "other_sae"), ("coactivation", "sae")):
        source = f"{name} LEFT JOIN {_ANALYSED} o ON o.sae = {name}.{sae}"
        offends = "o.d_sae IS NULL OR other < 0 OR other >= o.d_sae"
        check = rows(f"{name}.other", "the other feature exists", offends, "other", source)
        key = ", ".join(f'{name}."{column}"' for column in check.key)
        query = f"SELECT {key}, {name}.{sae} || ' ' || other AS found FROM {source} WHERE {offends}"  # noqa: S608
        found.append(Check(check.name, check.meaning, query, check.key))
    return found


_PLACE = (
    "examples e LEFT JOIN (SELECT block, len(tokens) AS context FROM docs) d USING (block) "
    "JOIN saes s USING (sae)"
)

CHECKS: tuple[Check, ...] = (
    *_features(),
    *_models(),
    *_heads(),
    *_tokens(),
    *_others(),
    rows(
        "examples.block", "its block is in docs", "block NOT IN (SELECT block FROM docs)", "block"
    ),
    rows(
        "examples.position", "it lies inside its block, and not on BOS unless the SAE counts it",
        "position >= d.context OR position < (CASE WHEN s.include_bos THEN 0 ELSE 1 END)", "position",
        _PLACE,
    ),
    rows(
        "docs.tokens", "every token id is in a vocabulary",
        "list_min(tokens) < 0 OR list_max(tokens) >= (SELECT max(d_vocab) FROM models)", "list_max(tokens)",
    ),
    grouped(
        "vocab.complete", "it has as many tokens as the model's d_vocab", "count(*)",
        "count(*) != max(m.d_vocab)", ("model",), "vocab JOIN models m USING (model)",
    ),
    grouped(
        "features.complete", "an analysed SAE has a row for each of its d_sae features", "count(*)",
        "count(*) != max(s.d_sae)", ("sae",), "features JOIN saes s USING (sae)",
    ),
    rows(
        "qk_products.other_sae", "it pairs a q SAE with a k SAE of the same head, with all its features",
        "NOT coalesce(q.site = 'q' AND k.site = 'k' AND q.model = k.model AND q.layer = k.layer "
        "AND q.head = k.head AND len(products) = k.d_sae, false)", "other_sae",
        "(SELECT p.sae, p.other_sae, p.feature, p.products, struct_pack(site := q.site, model := q.model, "
        "layer := q.layer, head := q.head) AS q, struct_pack(site := k.site, model := k.model, "
        "layer := k.layer, head := k.head, d_sae := k.d_sae) AS k FROM qk_products p "
        "LEFT JOIN saes q ON q.sae = p.sae LEFT JOIN saes k ON k.sae = p.other_sae)",
    ),
)  # fmt: skip
