"""Counters of what this process did with steps, for Prometheus.

A worker's children count in files that its metrics server adds up (``PROMETHEUS_MULTIPROC_DIR``, set by
``atlas worker`` before anything is counted); in any other process they count in memory, and cost nothing.
Names, labels and units are explained in docs/operations.md.
"""

from prometheus_client import Counter, Histogram

STEPS = Counter("atlas_worker_steps", "Steps that ended here, by how", ("kind", "outcome"))
UNITS = Counter("atlas_worker_units", "Progress made here, in a kind's own units", ("kind", "unit"))
TOKENS = Counter("atlas_worker_tokens", "Tokens of text worked through here", ("kind",))
SECONDS = Histogram(
    "atlas_worker_step_seconds",
    "Time that a step took here, ended how it may",
    ("kind",),
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 16 * 3600),
)
PEAK = Histogram(
    "atlas_worker_step_peak_bytes",
    "Most memory that the process held during a step",
    ("kind",),
    buckets=tuple(2.0**power for power in range(28, 41, 2)),
)
