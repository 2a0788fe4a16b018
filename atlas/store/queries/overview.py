"""What a release holds: its models, SAEs with their quality, and where it comes from."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from atlas.errors import StoreError, one_of
from atlas.store.queries.rows import arrow

METRICS = (
    "l0",
    "variance_explained",
    "ce_clean",
    "ce_spliced",
    "ce_zero",
    "ce_mean",
    "ce_recovered",
    "ce_recovered_mean",
    "kl",
    "mse",
    "cosine",
    "l2_ratio",
    "alive",
    "dead",
    "n_tokens",
)


@dataclass(frozen=True)
class Model:
    """One model of the release, as its ``models`` row says."""

    model: str
    processing: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    source: str
    digest: str


def models(con: duckdb.DuckDBPyConnection) -> tuple[Model, ...]:
    """Every model of the release, by name.

    Raises StoreError if the release holds none, for then nothing else in it has a meaning.
    """
    names = ", ".join(Model.__dataclass_fields__)
    rows = con.execute(f"SELECT {names} FROM models ORDER BY model").fetchall()  # noqa: S608
    if not rows:
        raise StoreError("table models is empty; allowed: a release with at least one model")
    return tuple(Model(*row) for row in rows)


def find_model(known: Sequence[Model], name: str | None) -> Model:
    """The named model, or the first for None; StoreError names an unknown one and what exists."""
    if name is None:
        return known[0]
    one_of("model", name, [m.model for m in known], StoreError)
    return next(m for m in known if m.model == name)


def sae_table(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> pa.Table:
    """One row per SAE of a model with its metrics on a split, by layer, site and name.

    ``alive_share`` is alive / d_sae. SAEs without metrics stay, with NULLs.
    """
    columns = ", ".join(f"m.{name}" for name in METRICS)
    return arrow(
        con,
        f"""
        SELECT s.sae, s.site, s.layer, s.head, s.architecture, s.d_in, s.d_sae, s.k, s.l1_coefficient,
               s.tokens_trained, s.corpus, s.seed, s.processing, s.origin, s.include_bos,
               s.n_tokens AS tokens_summarised, {columns}, m.alive / s.d_sae AS alive_share
        FROM saes s LEFT JOIN sae_metrics m ON m.sae = s.sae AND m.split = ?
        WHERE s.model = ? ORDER BY s.layer, s.site, s.head NULLS FIRST, s.sae
        """,  # noqa: S608
        [split, model],
    )


@dataclass(frozen=True)
class SaeRef:
    """The identity of an SAE: enough to link to it and to know what can be asked of it."""

    sae: str
    model: str
    site: str
    layer: int
    head: int | None
    d_sae: int
    architecture: str
    n_tokens: int

    @property
    def variant(self) -> str:
        """What tells the SAEs of one site apart: the part of the name after the site.

        >>> SaeRef("m/L05.z.topk-768", "m", "z", 5, None, 768, "topk", 0).variant
        'topk-768'
        """
        return re.sub(r"^.*/", "", self.sae).rpartition(f"{self.site}.")[2]


def sae_refs(con: duckdb.DuckDBPyConnection) -> tuple[SaeRef, ...]:
    """Every SAE of the release, by model, layer, site and name."""
    rows = con.execute(
        "SELECT sae, model, site, layer, head, d_sae, architecture, n_tokens FROM saes "
        "ORDER BY model, layer, site, head NULLS FIRST, sae"
    ).fetchall()
    return tuple(SaeRef(*row) for row in rows)


def z_saes(refs: Sequence[SaeRef], model: str, variant: str | None = None) -> dict[int, SaeRef]:
    """One whole-layer z SAE per layer of a model: the named variant where it exists, else the first.

    >>> a = SaeRef("m/L00.z.relu-8", "m", "z", 0, None, 8, "relu", 1)
    >>> b = SaeRef("m/L00.z.topk-8", "m", "z", 0, None, 8, "topk", 1)
    >>> z_saes([a, b], "m")[0].sae, z_saes([a, b], "m", "topk-8")[0].sae
    ('m/L00.z.relu-8', 'm/L00.z.topk-8')
    """
    chosen: dict[int, SaeRef] = {}
    for ref in refs:
        if ref.model != model or ref.site != "z" or ref.head is not None:
            continue
        if ref.layer not in chosen or ref.variant == variant:
            chosen[ref.layer] = ref
    return chosen


def variants(refs: Sequence[SaeRef], model: str) -> tuple[str, ...]:
    """The variants of whole-layer z SAEs that a model has, in order of first appearance."""
    z = (r.variant for r in refs if r.model == model and r.site == "z" and r.head is None)
    return tuple(dict.fromkeys(z))


def provenance(con: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """The release's provenance, key by key."""
    return dict(con.execute("SELECT key, value FROM provenance ORDER BY key").fetchall())


def manifest(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """Tables of the release with their number of rows and digest."""
    return arrow(con, "SELECT table_name, rows, digest FROM manifest ORDER BY table_name")


def vocabulary(con: duckdb.DuckDBPyConnection, model: str) -> tuple[str, ...]:
    """The visible form of every token of a model; the index is the token id.

    Ids that the release leaves out read ``<id>``.
    """
    rows = arrow(con, "SELECT token, text FROM vocab WHERE model = ? ORDER BY token", [model])
    tokens, texts = rows["token"].to_pylist(), rows["text"].to_pylist()
    if tokens == list(range(len(tokens))):
        return tuple(texts)
    known = dict(zip(tokens, texts, strict=True))
    return tuple(known.get(i, f"<{i}>") for i in range(tokens[-1] + 1))


def readable(value: str) -> object:
    """A provenance value as data where it is JSON, else as it stands.

    >>> readable('{"seed": 1}'), readable("0.1.0")
    ({'seed': 1}, '0.1.0')
    """
    if not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def sae_digests(con: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """SHA-256 of every SAE's tensors, by name."""
    return dict(con.execute("SELECT sae, digest FROM saes ORDER BY sae").fetchall())
