"""From which tokens does a feature read? Its stored sources, gathered by token."""

from typing import Any

import numpy as np

from atlas.analysis.acts import first_of_runs
from atlas.analysis.dfa_rows import Rows
from atlas.analysis.examples import TOP
from atlas.analysis.text import Text
from atlas.kernels.sources import strongest_tokens

N_SOURCE_TOKENS = 10


def source_tokens(found: Rows, text: Text) -> dict[str, Any]:
    """The rows of ``dfa_tokens``: the 10 tokens with the largest share of a feature's positive sources.

    Only the stored sources of top examples count. ``n`` is the number of examples in which the token is among
    them. Ties go to the smaller token id.
    """
    ends = found.rows["n_sources"].cumsum(dtype=np.int64)
    top = np.flatnonzero(found.rows["code"] == TOP)
    rows, counts = found.rows[top], found.rows["n_sources"][top].astype(np.int64)
    starts = first_of_runs(rows["feature"])
    shape = (len(starts), N_SOURCE_TOKENS)
    token, n, share = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape)
    strongest_tokens(
        np.append(starts, len(rows)),
        ends[top] - counts,
        counts,
        rows["unit"].astype(np.float64),
        text.store.blocks(rows["block"]),
        found.sources.view(np.int16).reshape(-1, 3),
        text.d_vocab,
        *(token, n, share),
    )
    feature, rank = np.nonzero(n)
    return {
        "feature": rows["feature"][starts][feature].astype(np.int64),
        "rank": rank,
        "token": token[feature, rank],
        "share": share[feature, rank],
        "n": n[feature, rank],
    }
