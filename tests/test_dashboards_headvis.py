"""HeadVis's tree from a tiny model: against the attention patterns in plain loops, and read back."""

import json
import math
from itertools import chain

import numpy as np
import pytest
import torch

from atlas.errors import ModelError, StoreError
from atlas.heads.samples import PatternPass, Sampling, intervals, sparse
from atlas.interop.dashboards.headvis import write_headvis
from atlas.interop.dashboards.reading import read_headvis
from atlas.interop.dashboards.selection import Wanted, select
from atlas.lm.hooks import capture
from atlas.progress import NullProgress
from atlas.settings import load_settings
from atlas.store.connection import cursor, open_release
from atlas.store.parquet import write_table
from atlas.store.release import publish
from tests.dashboard_schemas import HV_CONFIG_KEYS, HV_HEAD, HV_METRICS, HV_PIPELINE_KEYS, problems
from tests.synthetic import synthetic_rows, to_arrow
from tests.tiny import N_HEADS, N_LAYERS, WORDS, model_folder, random_tokens, tiny_model

N_BLOCKS, CONTEXT = 60, 12
EDGES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


@pytest.fixture(scope="module")
def tokens():
    found = random_tokens(N_BLOCKS, CONTEXT, seed=2) % 9 + 1  # few words, so that they come again
    found[:, 0] = 0
    return found


@pytest.fixture(scope="module")
def patterns(tokens):
    """[block, layer, head, query, key]"""
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(N_LAYERS)]
    _, found = capture(tiny_model(), torch.from_numpy(tokens), (), hooks)
    return torch.stack([found[hook] for hook in hooks], 1).double().numpy()


def make_release(folder, tokens, **changed):
    model = tiny_model()
    about = {"source": model.files.source, "digest": model.files.digest, "processing": "raw"}
    saes = synthetic_rows(0, 2, 2, 8, 4, 8)["saes"][:2]
    scores = [
        {
            "model": model.name,
            "layer": 1,
            "head": 2,
            "score": "induction",
            "value": 0.25,
            "n": 3,
            "how": "text",
        }
    ]
    rows = {
        "models": [{"model": model.name, **model.shape._asdict(), **about, **changed}],
        "vocab": [
            {"model": model.name, "token": i, "text": word, "bytes": f" {word}".encode()}
            for i, word in enumerate(WORDS)
        ],
        "docs": [
            {"corpus": "tiny text", "block": i, "tokens": block.tolist(), "source": "d"}
            for i, block in enumerate(tokens)
        ],
        "saes": [row | {"model": model.name} for row in saes],
        "head_scores": scores,
    }
    parts = {}
    for name, found in rows.items():
        parts[name] = [folder / f"{name}.parquet"]
        write_table(parts[name][0], name, to_arrow(name, found))
    return cursor(open_release(publish(folder / "releases", "tiny", parts, {"config": "{}"}).path))


@pytest.fixture(scope="module")
def con(tmp_path_factory, tokens):
    return make_release(tmp_path_factory.mktemp("release"), tokens)


def write(con, folder, layers=(), n_blocks=2048, model_name=None):
    name = str(model_folder()) if model_name is None else model_name
    write_headvis(
        con, select(con, Wanted()), layers, folder, {"release": "tiny@1"}, load_settings(), NullProgress(),
        n_blocks=n_blocks, model_name=name,
    )  # fmt: skip
    return folder / "tiny" / "headvis" / "tiny-text"


@pytest.fixture(scope="module")
def tree(con, tmp_path_factory):
    return write(con, tmp_path_factory.mktemp("export"))


def read(path):
    return json.loads(path.read_text("utf8"))


def every_head(tree):
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            yield layer, head, read(tree / "heads" / f"L{layer}H{head}.json")


def test_the_tree_fits_the_schema(tree):
    config = read(tree / "config.json")
    assert set(config) == HV_CONFIG_KEYS
    assert set(config["pipeline_config"]) >= HV_PIPELINE_KEYS
    assert config["heads"] == [[layer, head] for layer in range(N_LAYERS) for head in range(N_HEADS)]
    assert set(config["metrics"]) == set(config["metric_descriptions"]) >= set(HV_METRICS)
    for _, _, head in every_head(tree):
        assert problems(head, HV_HEAD) == []
    scatter = read(tree / "scatter_data.json")
    assert [(row["layer"], row["head"]) for row in scatter] == [tuple(pair) for pair in config["heads"]]
    for row in scatter:
        assert set(row) == {"layer", "head", *config["metrics"]}
    assert {p.name for p in tree.iterdir()} == {
        "config.json",
        "scatter_data.json",
        "server_config.json",
        "attributions",
        "heads",
    }
    assert len(list((tree / "heads").iterdir())) == N_LAYERS * N_HEADS


def test_metrics_against_loops(tree, tokens, patterns):
    for row in read(tree / "scatter_data.json"):
        mine = patterns[:, row["layer"], row["head"]]
        own, before, entropy, distance, square, induction = [], [], [], [], [], []
        for block, pattern in zip(tokens, mine, strict=True):
            for i in range(1, CONTEXT):
                own.append(pattern[i, i])
                before.append(pattern[i, i - 1])
                entropy.append(-sum(p * math.log(p) for p in pattern[i, : i + 1] if p > 0))
                distance.append(sum((i - j) * pattern[i, j] for j in range(i + 1)))
                square.append(sum((i - j) ** 2 * pattern[i, j] for j in range(i + 1)))
                after = [j + 1 for j in range(i) if block[j] == block[i] and j + 1 < i]
                if after:
                    induction.append(sum(pattern[i, j] for j in after))
        assert len(induction) > 100
        expected = [
            np.mean(own), np.mean(before), np.mean(entropy), np.mean(distance),
            np.mean(square) - np.mean(distance) ** 2, np.mean(induction),
        ]  # fmt: skip
        found = [row[name] for name in HV_METRICS]
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_scores_of_the_release_stand_beside(tree):
    known = [row["score_induction"] for row in read(tree / "scatter_data.json")]
    assert known == [None] * 5 + [0.25]


def largest_of(pattern):
    return max(pattern[i, j] for i in range(1, CONTEXT) for j in range(1, i + 1))


def expected_entries(pattern):
    """The 8 strongest sources of each destination that reach 0.005, in reading order."""
    found = {}
    for i in range(CONTEXT):
        strongest = sorted(range(CONTEXT), key=lambda j: (-pattern[i, j], j))[:8]
        found |= {i * CONTEXT + j: pattern[i, j] for j in sorted(strongest) if pattern[i, j] >= 0.005}
    return found


def test_sequences_are_patterns_of_the_text(tree, tokens, patterns):
    for layer, head, payload in every_head(tree):
        for one in payload["sequences"]:
            block = one["sequence_id"]
            pattern = patterns[block, layer, head]
            assert one["tokens"] == [f" {WORDS[t]}" for t in tokens[block]]
            assert one["seq_len"] == CONTEXT
            assert one["max_activation"] == pytest.approx(largest_of(pattern), abs=1e-4)
            expected = expected_entries(pattern)
            assert one["attention_indices"] == list(expected)
            np.testing.assert_allclose(one["attention_values"], list(expected.values()), atol=1e-4)


def test_which_sequences_are_shown(tree, patterns):
    """The strongest blocks of the last interval, in order; at most three of each other one."""
    for layer, head, payload in every_head(tree):
        largest = np.array([largest_of(pattern[layer, head]) for pattern in patterns])
        shown = [(one["interval"], one["sequence_id"]) for one in payload["sequences"]]
        assert [interval for interval, _ in shown] == sorted(interval for interval, _ in shown)
        top = [block for interval, block in shown if interval == 5]
        assert top == sorted(range(N_BLOCKS), key=lambda b: (-largest[b], b))[: len(top)]
        assert 8 <= len(top) <= 10
        quantiles = np.quantile(largest, [0.2, 0.4, 0.6, 0.8])
        for interval in range(1, 5):
            of_it = [block for i, block in shown if i == interval]
            assert len(set(of_it)) == len(of_it) == 3
            # Intervals are cut at thousandths of attention.
            low, high = [0, *quantiles][interval - 1], quantiles[interval - 1]
            gap = np.abs(np.diff(np.sort(largest))).max() + 2e-3
            assert all(low - gap <= largest[block] <= high + gap for block in of_it)


def test_sums_over_what_is_shown(tree):
    for _, _, payload in every_head(tree):
        bins, queries, keys = [0.0] * 13, {}, {}
        for one in payload["sequences"]:
            for index, value in zip(one["attention_indices"], one["attention_values"], strict=True):
                q, k = index // CONTEXT, index % CONTEXT
                bins[sum(edge <= q - k for edge in EDGES) - 1] += value
                queries[one["tokens"][q]] = queries.get(one["tokens"][q], 0) + value
                keys[one["tokens"][k]] = keys.get(one["tokens"][k], 0) + value
        assert payload["qk_distance_histogram"]["bin_edges"] == EDGES
        np.testing.assert_allclose(payload["qk_distance_histogram"]["bin_values"], bins, atol=1e-3)
        for name, total in (("top_query_tokens", queries), ("top_key_tokens", keys)):
            found = {one["token"]: one["weight"] for one in payload[name]}
            assert found == pytest.approx(total, abs=1e-3)
            weights = [one["weight"] for one in payload[name]]
            assert weights == sorted(weights, reverse=True)


def test_histogram_of_all_blocks(tree, patterns):
    for layer, head, payload in every_head(tree):
        largest = [np.float32(largest_of(pattern[layer, head])) for pattern in patterns]
        counts, _ = np.histogram(largest, bins=50, range=(0, 1))
        assert payload["histogram"]["bin_values"] == counts.tolist()
        assert payload["statistics"]["mean_max_activation"] == pytest.approx(np.mean(largest), abs=1e-3)
        assert payload["statistics"]["n_samples"] == len(payload["sequences"])


def test_batches_change_nothing(tokens, patterns):
    """Whatever the batches, the same statistics and the same patterns are kept."""
    found = []
    for size in (1, 7, N_BLOCKS):
        work = PatternPass(N_LAYERS, N_HEADS, Sampling(n_top=3, n_drawn=4))
        for start in range(0, N_BLOCKS, size):
            stop = min(start + size, N_BLOCKS)
            work.begin(torch.from_numpy(tokens[start:stop]), list(range(start, stop)))
            for layer in range(N_LAYERS):
                work.update(layer, torch.from_numpy(patterns[start:stop, layer]).float())
        found.append(work)
    first = found[0]
    for other in found[1:]:
        for name, values in first.statistics.means().items():
            np.testing.assert_allclose(values, other.statistics.means()[name], rtol=1e-7)
        np.testing.assert_array_equal(first.statistics.max_attention, other.statistics.max_attention)
        for one, two in zip(chain(*first.heads), chain(*other.heads), strict=True):
            assert [(key, kept.block) for key, kept in one.top] == [
                (key, kept.block) for key, kept in two.top
            ]
            assert [key for key, _ in one.drawn] == [key for key, _ in two.drawn]
            assert len(one.top) == 3
            assert len(one.drawn) == 4
            for (_, a), (_, b) in zip(one.drawn, two.drawn, strict=True):
                assert (a.block, a.indices.tolist()) == (b.block, b.indices.tolist())
    drawn = [tuple(kept.block for _, kept in head.drawn) for head in chain(*first.heads)]
    assert len(set(drawn)) == len(drawn)


def test_equal_entries_are_taken_in_order():
    pattern = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]])
    indices, values = sparse(pattern, 2, 0.0)
    assert indices.tolist() == [0, 1, 5, 7]
    assert values.tolist() == pytest.approx([0.25, 0.25, 0.4, 0.4])
    assert sparse(pattern, 3, 0.2)[0].tolist() == [0, 1, 2, 5, 7]
    assert sparse(pattern, 9, 0.0)[0].tolist() == list(range(8))


def test_intervals_of_few_and_of_equal_values():
    assert intervals(np.array([0, 0, 7, 0]), 3).tolist() == [0.75, 0.75]
    assert intervals(np.zeros(4, np.int64), 3).tolist() == [0.0, 0.0]


def test_a_layer_and_fewer_blocks(con, tmp_path):
    tree = write(con, tmp_path, layers=[1], n_blocks=4)
    assert read(tree / "config.json")["heads"] == [[1, 0], [1, 1], [1, 2]]
    assert read(tree / "config.json")["pipeline_config"]["n_sequences"] == 4
    payload = read(tree / "heads" / "L1H0.json")
    assert {one["sequence_id"] for one in payload["sequences"]} <= set(range(4))
    assert sum(payload["histogram"]["bin_values"]) == 4


def test_read_back(tree):
    found = read_headvis(tree)
    assert found["scatter"].to_pylist() == read(tree / "scatter_data.json")
    rows = iter(found["sequences"].to_pylist())
    for layer, head, payload in every_head(tree):
        for one in payload["sequences"]:
            row = next(rows)
            assert (row.pop("layer"), row.pop("head")) == (layer, head)
            for name, value in one.items():
                assert row[name] == (
                    pytest.approx(value, rel=1e-6) if "values" in name or "max" in name else value
                )
    assert next(rows, None) is None


def test_a_damaged_tree_is_refused(con, tmp_path):
    with pytest.raises(StoreError, match=r"config\.json"):
        read_headvis(tmp_path)
    tree = write(con, tmp_path, layers=[0], n_blocks=2)
    (tree / "heads" / "L0H1.json").write_text("{}")
    with pytest.raises(StoreError, match=r"L0H1\.json"):
        read_headvis(tree)
    (tree / "heads" / "L0H1.json").unlink()
    with pytest.raises(StoreError, match=r"L0H1\.json"):
        read_headvis(tree)


def test_another_model_is_refused(tmp_path, tokens):
    con = make_release(tmp_path, tokens[:2], digest="0" * 64)
    with pytest.raises(ModelError, match=r"has the digest .*, the release's model 'tiny' has 000000000000"):
        write(con, tmp_path / "out")


def test_a_model_that_is_not_here_is_refused(con, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        write(con, tmp_path / "out", model_name="./nowhere")
