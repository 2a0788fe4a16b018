"""Tables that hold others' rows in another order: what searches ask, found without reading everything.

Tables about features lie in the order of features. Features of a token or of a place in the text would need
all their rows (a release of GPT-2's size has 55 million about tokens); in ``token_index`` and
``example_places`` they lie beside each other, so that DuckDB skips the rest by its minima and maxima.
"""

_OF_TOKENS = """
SELECT role, token, sae, feature, precision AS score FROM token_stats
UNION ALL
SELECT CASE sign WHEN 1 THEN 'up' ELSE 'down' END, token, sae, feature, round(abs(value), 3)::FLOAT
FROM logit_effects
UNION ALL
SELECT 'from', token, sae, feature, round(share, 4)::FLOAT FROM dfa_tokens"""
"""The rows of ``token_index``, in no order."""

_OF_PLACES = "SELECT block, position, sae, feature FROM examples WHERE example_group = 'top'"
"""The rows of ``example_places``, in no order."""

INDEXES = {"token_index": _OF_TOKENS, "example_places": _OF_PLACES}
"""Each one's rows out of other tables; a release made before they were has none."""
