"""The columns of a release's views, and of the two tables that say what it was made from."""

from dataclasses import replace

from atlas.tables import F32, F64, I16, I32, I64, STR, TABLES, Column, Table

C = Column


def _of(table: str, *names: str) -> tuple[Column, ...]:
    """Columns that a view has from a table."""
    return tuple(TABLES[table].column(name) for name in names)


def _or_null(*columns: Column) -> tuple[Column, ...]:
    """Columns that a view has no value of where the joined table has no row."""
    return tuple(replace(column, nullable=True) for column in columns)


_FEATURE = _of("features", "sae", "feature")
_EXAMPLE = _of("examples", "sae", "feature", "example_group", "rank")
_HEAD = _of("head_scores", "model", "layer", "head")
_RANKED = "place among the head's features by {}, from 0"

# One line per column reads better here than the formatter's one line per argument.
# fmt: off
VIEW_COLUMNS: dict[str, tuple[Column, ...]] = {
    "activation_histogram": (
        *_FEATURE, *_of("activation_counts", "scale"), C("bin", I16, "bin, from 0"),
        C("low", F32, "lower edge of the bin, which it holds"),
        C("high", F32, "upper edge of the bin; the last one holds it"),
        C("n", I32, "active tokens in the bin", "tokens"),
    ),
    "positions": (
        *_FEATURE, *_of("examples", "position"),
        C("n_top", I32, "of its 2000 strongest tokens, those at this position", "tokens"),
        C("n_active", I32, "active tokens at this position", "tokens"),
        C("sum_activation", F32, "summed activation at this position"),
    ),
    "head_features": (
        *_of("saes", "sae", "model", "layer"), *_of("head_attribution", "head", "feature"),
        *_of("head_attribution", "decoder_share", "fve", "dfa_share"),
        C("decoder_rank", I64, _RANKED.format("decoder share")), C("fve_rank", I64, _RANKED.format("FVE")),
        C("dfa_rank", I64, _RANKED.format("DFA share")),
        *_of("features", "alive", "density", "n_active", "max_activation"),
    ),
    "dfa_sources": (
        *_EXAMPLE, C("head", I16, "head that reads the source"),
        C("source", I16, "position of the source; 0 is BOS", "tokens"),
        C("contribution", F32, "what the head adds to the pre-activation from there"),
        *_of("examples", "block", "position"),
        C("distance", I16, "how far before the example's position the source lies", "tokens"),
    ),
    "families": (
        C("number", I32, "order of the families, from 0"), C("family", STR, "the family's name"),
        C("table_name", STR, "table whose columns the rule is about"),
        C("rule", STR, "condition in SQL that makes a feature a member"),
        C("meaning", STR, "what its features do"), C("origin", STR, "seed document and row of the idea"),
    ),
    "feature_families": (
        *_FEATURE, C("family", STR, "a family that the feature belongs to (see families)"),
        C("value", F64, "what the family's rule is about, for this feature"),
    ),
    "head_induction": (
        *_HEAD,
        C("kind", STR, "long-prefix or short-prefix; NULL: not an induction head", nullable=True),
        C("induction", F64, "induction score on random tokens twice (head_scores)", nullable=True),
        C("induction_text", F64, "induction score on text (head_scores)", nullable=True),
        C("attention_1", F64, "mean attention after one repeated token"),
        C("attention_long", F64, "mean attention after five and more repeated tokens"),
        C("dla_1", F64, "mean direct logit attribution after one repeated token", "logits"),
        C("dla_long", F64, "mean direct logit attribution after five and more", "logits"),
        C("n_attended", I64, "pairs of the text with attention above 0.3", nullable=True),
        C("n_1", I64, "of these, pairs in which one token matches", nullable=True),
        C("n_longer", I64, "of these, pairs in which two or more match", nullable=True),
        C("longer_share", F64, "n_longer / (n_1 + n_longer)", nullable=True),
        C("n_pairs", I32, "pairs whose match of at least 2 tokens was cut to 1", nullable=True),
        *_of("head_corruption", "before", "after"),
        C("n_attended_pairs", I32, "of these pairs, those with attention above 0.3 before", nullable=True),
        *_of("head_corruption", "attended_before", "attended_after"),
    ),
    "sae_summary": (
        *_of("saes", "sae", "model", "site", "layer", "head", "architecture", "d_in", "d_sae", "k"),
        *_of("saes", "l1_coefficient"),
        *_or_null(*_of("sae_metrics", "l0", "variance_explained", "cosine", "ce_clean", "ce_spliced")),
        *_or_null(*_of("sae_metrics", "ce_zero", "ce_recovered", "kl", "alive")),
        C("alive_fraction", F64, "alive / d_sae", nullable=True),
        *_of("saes", "tokens_trained", "n_tokens", "origin"),
    ),
}
"""By view, in the view's order; what is a column of a table keeps its meaning."""

RECORDS = (
    Table("manifest", "table: its rows and a digest of its content", (
        C("table_name", STR, "the table"), C("rows", I64, "its rows"),
        C("digest", STR, "SHA-256 of its content, without columns that differ from run to run"),
    ), ("table_name",)),
    Table("provenance", "thing that this release was made from or published as", (
        C("key", STR, "config, model, model_digest, processing, corpus, seed, code_version, release, ..."),
        C("value", STR, "as text; config and code_versions are JSON"),
    ), ("key",)),
)
"""What every release has beside its tables."""
