"""The views of a release: what people ask most often, under one name each."""

from typing import NamedTuple

from atlas.store.families import families_view, feature_families_view
from atlas.store.induction import induction_view
from atlas.tables import FULL_WEIGHT


class View(NamedTuple):
    """A view: its name, what one row is, and the statement that makes it."""

    name: str
    meaning: str
    create: str


_HEAD_FEATURES = """
CREATE VIEW head_features AS
SELECT a.sae, s.model, s.layer, a.head, a.feature, a.decoder_share, a.fve, a.dfa_share,
  row_number() OVER (PARTITION BY a.sae, a.head
    ORDER BY f.alive DESC, a.decoder_share DESC, a.feature) - 1 AS decoder_rank,
  row_number() OVER (PARTITION BY a.sae, a.head
    ORDER BY f.alive DESC, a.fve DESC NULLS LAST, a.feature) - 1 AS fve_rank,
  row_number() OVER (PARTITION BY a.sae, a.head
    ORDER BY f.alive DESC, a.dfa_share DESC NULLS LAST, a.feature) - 1 AS dfa_rank,
  f.alive, f.density, f.n_active, f.max_activation
FROM head_attribution a JOIN saes s USING (sae) JOIN features f USING (sae, feature)
"""

_SAE_SUMMARY = """
CREATE VIEW sae_summary AS
SELECT s.sae, s.model, s.site, s.layer, s.head, s.architecture, s.d_in, s.d_sae, s.k, s.l1_coefficient,
  m.l0, m.variance_explained, m.cosine, m.ce_clean, m.ce_spliced, m.ce_zero, m.ce_recovered, m.kl,
  m.alive, m.alive / s.d_sae AS alive_fraction, s.tokens_trained, s.n_tokens, s.origin
FROM saes s LEFT JOIN sae_metrics m ON m.sae = s.sae AND m.split = 'eval'
"""

_DFA_SOURCES = """
CREATE VIEW dfa_sources AS
SELECT d.sae, d.feature, d.example_group, d.rank, d.s.head, d.s.source,
  (d.s.weight * d.unit)::FLOAT AS contribution, e.block, e.position, e.position - d.s.source AS distance
FROM (SELECT sae, feature, example_group, rank, unit, unnest(sources) AS s FROM dfa) d
JOIN examples e USING (sae, feature, example_group, rank)
"""

_ACTIVATION_HISTOGRAM = """
CREATE VIEW activation_histogram AS
SELECT sae, feature, scale, bin,
  CASE WHEN scale = 'linear' THEN high::DOUBLE * bin / bins
    WHEN bin = 0 THEN low ELSE low::DOUBLE * pow(high::DOUBLE / low, bin / bins) END::FLOAT AS low,
  CASE WHEN bin + 1 = bins THEN high WHEN scale = 'linear' THEN high::DOUBLE * (bin + 1) / bins
    ELSE low::DOUBLE * pow(high::DOUBLE / low, (bin + 1) / bins) END::FLOAT AS high, n
FROM (SELECT sae, feature, scale, low, high, len(n) AS bins,
  unnest(range(len(n)))::SMALLINT AS bin, unnest(n) AS n FROM activation_counts)
"""

_POSITIONS = """
CREATE VIEW positions AS
SELECT sae, feature, unnest(position) AS position, unnest(n_top) AS n_top, unnest(n_active) AS n_active,
  unnest(sum_activation) AS sum_activation
FROM position_counts
"""

VIEWS: tuple[View, ...] = (
    View(
        "activation_histogram",
        "One row per SAE x feature x scale x bin: its lower edge, its upper edge, and the active tokens in "
        "it (a bin holds its lower edge, the last one both)",
        _ACTIVATION_HISTOGRAM,
    ),
    View(
        "positions",
        "One row per SAE x feature x position where it fires: how many of its 2000 strongest tokens are "
        "there (n_top), how many of all (n_active), and their summed activation",
        _POSITIONS,
    ),
    View(
        "head_features",
        "One row per z SAE x head x feature, with the feature's rank (from 0) in the head by each measure; "
        "features that fire rank before those that never do",
        _HEAD_FEATURES,
    ),
    View(
        "dfa_sources",
        "One row per stored source of a kept example: its head, its position, what it contributes to the "
        f"pre-activation (rounded to 1/{FULL_WEIGHT} of the example's largest), "
        "and how many tokens back it lies",
        _DFA_SOURCES,
    ),
    View(
        "families",
        "One row per feature family: the rule that makes it (on columns of table_name), what it means, and "
        "where the idea comes from",
        families_view(),
    ),
    View(
        "feature_families",
        "One row per SAE x feature x family that it belongs to, with the value that the family's rule is "
        "about; a feature may be in several",
        feature_families_view(),
    ),
    View(
        "head_induction",
        "One row per head: whether it is a long-prefix or a short-prefix induction head (NULL: neither), and "
        "the numbers that say so, on random tokens, on text and with long matches cut to one token",
        induction_view(),
    ),
    View("sae_summary", "One row per SAE, with its quality on the split eval", _SAE_SUMMARY),
)
