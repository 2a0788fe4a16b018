"""Counts over the activations of features, which lie one feature after the other (``starts``)."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@compiled
def by_feature(feature: Ints, d_sae: int) -> tuple[Ints, Ints]:
    """Indices that sort by feature and then as they stand, and where each feature's begin."""
    starts, order = np.zeros(d_sae + 1, np.int64), np.empty(len(feature), np.int64)
    for i in range(len(feature)):
        starts[feature[i] + 1] += 1
    for f in range(d_sae):
        starts[f + 1] += starts[f]
    at = starts[:d_sae].copy()
    for i in range(len(feature)):
        order[at[feature[i]]] = i
        at[feature[i]] += 1
    return order, starts


@compiled
def count_positions(starts: Ints, strongest: Ints, position: Ints, most: int, n: Ints) -> None:
    """Add to ``n`` [d_sae, context] the positions of each feature's ``most`` strongest activations."""
    for f in range(len(n)):
        for i in range(starts[f], min(starts[f + 1], starts[f] + most)):
            n[f, position[strongest[i]]] += 1


@compiled
def strongest_labels(
    starts: Ints, label: Ints, value: Floats, n_labels: int, found: Ints, n: Ints, total: Floats, top: Floats
) -> None:
    """Fill each row [d_sae, k] with the k labels of the largest summed value, largest first.

    ``n`` counts a label's activations (0: the row ends before), ``total`` sums them in the order in which
    they come, ``top`` is the largest. Activations whose label is negative do not count; ties, in float32, go
    to the smaller label.
    """
    k = found.shape[1]
    count, sums = np.zeros(n_labels, np.int64), np.zeros(n_labels, np.float64)
    largest, seen = np.zeros(n_labels, np.float32), np.empty(n_labels, np.int64)
    order, rounded = np.empty(n_labels, np.int64), np.empty(1, np.float32)
    bits = rounded.view(np.int32)
    for f in range(len(found)):
        n_seen = 0
        for i in range(starts[f], starts[f + 1]):
            of = label[i]
            if of >= 0:
                if count[of] == 0:
                    seen[n_seen] = of
                    n_seen += 1
                count[of] += 1
                sums[of] += value[i]
                largest[of] = max(largest[of], value[i])
        for j in range(n_seen):
            rounded[0] = sums[seen[j]]
            order[j] = ((np.int64(0x7FFFFFFF) - bits[0]) << 32) | seen[j]
        order[:n_seen].sort()
        for rank in range(k):
            n[f, rank] = 0
            if rank < n_seen:
                of = order[rank] & np.int64(0xFFFFFFFF)
                found[f, rank], n[f, rank] = of, count[of]
                total[f, rank], top[f, rank] = sums[of], largest[of]
        for j in range(n_seen):
            count[seen[j]], sums[seen[j]], largest[seen[j]] = 0, 0.0, 0.0
