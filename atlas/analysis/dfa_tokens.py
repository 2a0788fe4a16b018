"""From which tokens does a feature read? Its stored sources, gathered by token."""

from typing import Any

import numpy as np

from atlas.analysis.acts import first_of_runs, rank_in_runs
from atlas.analysis.dfa_rows import Rows
from atlas.analysis.examples import TOP
from atlas.analysis.text import Text

N_SOURCE_TOKENS = 10


def source_tokens(found: Rows, text: Text) -> dict[str, Any]:
    """The rows of ``dfa_tokens``: the 10 tokens with the largest share of a feature's positive sources.

    Only the stored sources of top examples count. ``n`` is the number of examples in which the token is among
    them. Ties go to the smaller token id.
    """
    counts = found.rows["n_sources"].astype(np.int64)
    example = np.repeat(np.arange(len(counts)), counts)
    counted = (found.sources["weight"] > 0) & (found.rows["code"] == TOP)[example]
    example, sources = example[counted], found.sources[counted]
    rows = found.rows[example]
    token = text.token(rows["block"].astype(np.int64) * text.context + sources["source"])
    value = sources["weight"] * rows["unit"].astype(np.float64)
    order = np.lexsort((example, token, rows["feature"]))
    feature, token, value, example = (a[order] for a in (rows["feature"], token, value, example))
    pair = feature.astype(np.int64) * text.d_vocab + token
    starts = first_of_runs(pair)
    total = np.add.reduceat(value, starts) if len(starts) else value
    new = np.concatenate([[True], (example[1:] != example[:-1]) | (pair[1:] != pair[:-1])])[: len(pair)]
    n = np.add.reduceat(new, starts, dtype=np.int64) if len(starts) else np.empty(0, np.int64)
    of, token = feature[starts].astype(np.int64), token[starts]
    best = np.lexsort((token, -total, of))
    best = best[rank_in_runs(of[best]) < N_SOURCE_TOKENS]
    all_of = np.bincount(of, weights=total) if len(of) else total
    return {
        "feature": of[best],
        "rank": rank_in_runs(of[best]),
        "token": token[best],
        "share": total[best] / all_of[of[best]],
        "n": n[best],
    }
