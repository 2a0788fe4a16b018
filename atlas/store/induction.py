"""Long-prefix and short-prefix induction heads: a rule over the prefix curve, as the view ``head_induction``.

Question
    Which heads look at what followed an earlier copy of their token, and do they want more than that one
    token to match?

Rule
    With ``attention(n)`` the prefix curve (``head_prefixes``), ``attention_long`` its mean over n >= LONG::

        induction head   attention_long >= INDUCTION
        long-prefix      an induction head with attention(1) <  SHARE * attention_long
        short-prefix     an induction head with attention(1) >= SHARE * attention_long

    Both thresholds are choices, and the view has every number that they are made on. In seed 001 head 5.1 of
    GPT-2 small goes from below 0.3 to above 0.7, and 5.5 starts at 0.7 (seed 002): one on each side.

Source
    Seed 001, rows B11 to B15.
"""

LONG = 5
"""Repeated tokens from which a stretch counts as long."""
INDUCTION = 0.2
"""Attention to the right token, over long stretches, from which a head counts as an induction head."""
SHARE = 0.5
"""Share of that attention that a short-prefix head has with one repeated token alone."""
SHOWN_THRESHOLD = 0.3
"""Attention on text above which matches are counted in the view (seed 001)."""


def induction_view() -> str:
    """The statement that makes the view."""
    return f"""
CREATE VIEW head_induction AS
WITH curve AS (
  SELECT model, layer, head, max(attention) FILTER (prefix = 1) AS attention_1,
    avg(attention) FILTER (prefix >= {LONG}) AS attention_long,
    max(dla) FILTER (prefix = 1) AS dla_1, avg(dla) FILTER (prefix >= {LONG}) AS dla_long
  FROM head_prefixes GROUP BY ALL),
text AS (
  SELECT model, layer, head, max(n_attended) AS n_attended,
    (sum(n) FILTER (prefix = 1))::BIGINT AS n_1, (sum(n) FILTER (prefix >= 2))::BIGINT AS n_longer
  FROM head_text_prefixes WHERE threshold = {SHOWN_THRESHOLD} GROUP BY ALL),
scores AS (
  SELECT model, layer, head, max(value) FILTER (score = 'induction') AS induction,
    max(value) FILTER (score = 'induction_text') AS induction_text
  FROM head_scores WHERE score IN ('induction', 'induction_text') GROUP BY ALL)
SELECT c.model, c.layer, c.head,
  CASE WHEN attention_long >= {INDUCTION} THEN
    CASE WHEN attention_1 < {SHARE} * attention_long THEN 'long-prefix' ELSE 'short-prefix' END END AS kind,
  induction, induction_text, attention_1, attention_long, dla_1, dla_long,
  text.n_attended, n_1, n_longer, n_longer / nullif(n_1 + n_longer, 0) AS longer_share,
  x.n AS n_pairs, x.before, x.after, x.n_attended AS n_attended_pairs, x.attended_before, x.attended_after
FROM curve c LEFT JOIN text USING (model, layer, head) LEFT JOIN scores USING (model, layer, head)
  LEFT JOIN head_corruption x USING (model, layer, head)
"""  # noqa: S608
