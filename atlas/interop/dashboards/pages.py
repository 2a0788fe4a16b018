"""What SAEDashboard's format says of each feature, from the tables of a release, a few features at a time."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt

from atlas.interop.dashboards.examples import Blocks, Example, examples_of
from atlas.interop.dashboards.rows import (
    Runs,
    block_tokens,
    columns_of,
    one_short,
    rows_of,
    short,
    token_strings,
)
from atlas.interop.dashboards.selection import Part
from atlas.interop.dashboards.weights import Decoder

ALIGNED = 3
"""Coordinates of a decoder row that are listed, as in SAEDashboard."""
Ints = npt.NDArray[np.int64]
FindDecoder = Callable[[Part], Decoder | None]
_GROUP_ORDER = (
    "CASE example_group WHEN 'top' THEN 0 WHEN 'random' THEN 11 ELSE 10 - substr(example_group, 2)::INT END"
)


class Page(NamedTuple):
    """A feature: the fields of SAEDashboard's format but for its examples, the examples, and what is left."""

    feature: int
    fields: dict[str, Any]
    examples: list[Example]
    max_activation: float
    near: list[int]
    near_cosines: list[float]


class Batch(NamedTuple):
    """The rows that a few features' pages are made of."""

    part: Part
    decoder: Decoder | None
    features: Runs
    histogram: Runs
    logits: Runs
    logit_histogram: Runs
    coactivation: Runs
    neighbours: Runs
    shares: Runs
    examples: Runs
    dfa: Runs
    blocks: Blocks


class Pages:
    """Pages of an open release. Memory holds a batch's rows, an SAE's feature numbers and a model's words."""

    def __init__(self, con: duckdb.DuckDBPyConnection, find_decoder: FindDecoder) -> None:
        self._con, self._find = con, find_decoder
        found = con.execute("SELECT corpus, len(tokens) FROM docs ORDER BY block LIMIT 1").fetchall()
        self.dataset = str(found[0][0]) if found else ""
        self.context = int(found[0][1]) if found else 0
        self.n_blocks = int(con.execute("SELECT count(*) FROM docs").fetchall()[0][0])
        self._there = columns_of(con)
        self._words: tuple[str, list[str]] = ("", [])

    def shape(self, model: str) -> dict[str, int]:
        """A model's n_layers, n_heads and d_model."""
        sql = "SELECT n_layers, n_heads, d_model FROM models WHERE model = ?"
        found = self._con.execute(sql, [model]).fetchall()
        values = found[0] if found else (0, 0, 0)
        return dict(zip(("n_layers", "n_heads", "d_model"), values, strict=True))

    def decoder(self, part: Part) -> Decoder | None:
        """The SAE's decoder, if its files are on this machine."""
        return self._find(part)

    def of(self, part: Part, size: int) -> Iterator[list[Page]]:
        """The wanted features of an SAE, at most ``size`` at a time."""
        decoder = self._find(part)
        for features in part.batches(self._con, size):
            batch = self._read(part, decoder, features)
            yield [self._page(batch, int(feature)) for feature in features]

    def words(self, model: str) -> list[str]:
        """Every token of a model as text; those of the last model are kept."""
        if self._words[0] != model:
            self._words = model, token_strings(self._con, model)
        return self._words[1]

    def _read(self, part: Part, decoder: Decoder | None, features: Ints) -> Batch:
        def rows(table: str, columns: str, more: str = "", order: str = "") -> Runs:
            return rows_of(self._con, self._there, table, columns.split(), part.sae, features, more, order)

        example_columns = "example_group rank block position activation active_positions active_values"
        examples = rows(
            "examples", example_columns, "AND example_group <> 'negative'", f"{_GROUP_ORDER}, rank"
        )
        return Batch(
            part,
            decoder,
            rows("features", "density max_activation quantiles"),
            rows("activation_histogram", "low high n", "AND scale = 'linear'", "bin"),
            rows("logit_effects", "sign token value", order="sign, rank"),
            rows("logit_histogram", "low high n"),
            rows("coactivation", "other pearson", "AND pearson IS NOT NULL", "pearson DESC, other"),
            rows("neighbours", "other cosine", "AND direction = 'decoder' AND scope = 'within'", "rank"),
            rows("head_attribution", "decoder_share", order="head"),
            examples,
            rows("dfa", "example_group rank unit sources"),
            block_tokens(self._con, examples.all("block")),
        )

    def _page(self, batch: Batch, feature: int) -> Page:
        words = self.words(batch.part.model)
        row = {name: values[0] for name, values in batch.features.columns(feature).items()}
        fields: dict[str, Any] = {"feature_index": feature}
        fields |= _alignment(batch.decoder, feature) | _correlated(batch, feature)
        fields |= _logits(batch.logits.columns(feature), words)
        fields["frac_nonzero"] = row["density"]
        fields |= _bars("freq_hist_data", *_middles(batch.histogram.columns(feature)))
        fields |= _bars("logits_hist_data", *_spread(batch.logit_histogram.columns(feature)))
        fields["n_prompts_total"], fields["n_tokens_in_prompt"] = self.n_blocks, self.context
        fields["dataset"] = self.dataset
        fields["decoder_weights_dist"] = short(batch.shares.columns(feature)["decoder_share"])
        decoder = batch.decoder
        fields["vector"] = [] if decoder is None else short(decoder.rows(np.array([feature]))[0])
        examples = examples_of(batch.examples, batch.dfa, batch.blocks, feature, row, words)
        near, strongest = batch.neighbours.columns(feature), one_short(row["max_activation"])
        return Page(feature, fields, examples, strongest, near["other"], short(near["cosine"]))


def _alignment(decoder: Decoder | None, feature: int) -> dict[str, Any]:
    """The largest coordinates of the decoder row, and their shares of its L1 norm; ties: the lower index."""
    indices, values, shares = [], [], []
    if decoder is not None:
        row = decoder.rows(np.array([feature]))[0].astype(np.float64)
        order = np.argsort(-row, kind="stable")[:ALIGNED]
        total = np.abs(row).sum()
        indices, values = order.tolist(), short(row[order])
        shares = short(np.abs(row[order]) / total if total > 0 else np.zeros(len(order)))
    return {
        "neuron_alignment_indices": indices,
        "neuron_alignment_values": values,
        "neuron_alignment_l1": shares,
    }


def _correlated(batch: Batch, feature: int) -> dict[str, Any]:
    """Features that fire together, by Pearson correlation; the cosine is that of the decoder rows."""
    together = batch.coactivation.columns(feature)
    others = np.array(together["other"], np.int64)
    decoder = batch.decoder
    cosines = [] if decoder is None or not len(others) else short(decoder.cosines(feature, others))
    return {
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": others.tolist(),
        "correlated_features_pearson": short(together["pearson"]),
        "correlated_features_l1": cosines,
    }


def _logits(effects: dict[str, list[Any]], words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, wanted in (("neg", -1), ("pos", 1)):
        at = [i for i, sign in enumerate(effects["sign"]) if sign == wanted]
        found[f"{name}_str"] = [words[effects["token"][i]] for i in at]
        found[f"{name}_values"] = short([effects["value"][i] for i in at])
    return found


def _bars(name: str, middles: list[float], heights: list[int]) -> dict[str, Any]:
    return {f"{name}_bar_values": middles, f"{name}_bar_heights": heights}


def _middles(bins: dict[str, list[Any]]) -> tuple[list[float], list[int]]:
    """The middle and the height of each bar of stored bins."""
    return short((np.array(bins["low"]) + np.array(bins["high"])) / 2), bins["n"]


def _spread(histogram: dict[str, list[Any]]) -> tuple[list[float], list[int]]:
    """The middle and the height of each bar of equal bins between two ends."""
    if not histogram["n"]:
        return [], []
    heights: list[int] = histogram["n"][0]
    low, high = histogram["low"][0], histogram["high"][0]
    return short(low + (high - low) * (np.arange(len(heights)) + 0.5) / len(heights)), heights
