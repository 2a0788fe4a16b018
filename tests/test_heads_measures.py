"""What is measured of heads, against plain loops in float64 and against the Hugging Face model itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from atlas.configs import HeadsConfig, SlotConfig, TaskConfig
from atlas.corpus.tokens import TokenStore, load_tokenizer
from atlas.errors import ConfigError
from atlas.heads import prefixes, reach, spectra
from atlas.heads.ablation import KINDS, Ablations, ablate
from atlas.heads.measure import measure_heads, measure_tasks
from atlas.heads.prompts import all_tasks, make_prompts, read_tasks
from atlas.heads.scores import HeadScores
from atlas.lm.hooks import capture
from atlas.pipeline.inputs import as_table
from atlas.progress import NullProgress
from atlas.sites import Site
from atlas.tables import TABLES
from tests.test_head_scores import causal_pattern

from .tiny import (
    D_HEAD,
    D_VOCAB,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    model_folder,
    random_tokens,
    save_store,
    tiny_model,
)

LAYERS = range(N_LAYERS)


def double(tensor):
    return tensor.detach().double().numpy()


# ---------------------------------------------------------------- where a head looks


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 100))
def test_reach_scores_against_loops(batch: int, positions: int, seed: int):
    pattern = causal_pattern(batch, 2, positions, seed)
    scores = HeadScores(1, 2)
    for row in pattern:
        reach.update_reach(scores, 0, row[None])
    found = {(row.head, row.score): row.value for row in reach.reach_rows(scores)}
    n = batch * (positions - 1)
    for head in range(2):
        cells = [
            (i, j, float(pattern[b, head, i, j]))
            for b in range(batch) for i in range(1, positions) for j in range(i + 1)
        ]  # fmt: skip
        distance = sum(a * (i - j) for i, j, a in cells) / n
        far = [(a, i - j) for i, j, a in cells if j > 0]
        expected = {
            "first_token": sum(a for _, j, a in cells if j == 0) / n,
            "self_attention": sum(a for i, j, a in cells if i == j) / n,
            "entropy": -sum(a * math.log(a) for _, _, a in cells) / n,
            "distance": distance,
            "distance_std": math.sqrt(max(0, sum(a * (i - j) ** 2 for i, j, a in cells) / n - distance**2)),
            "reach": sum(a * back for a, back in far) / sum(a for a, _ in far),
        }
        for name, value in expected.items():
            assert found[head, name] == pytest.approx(value, rel=1e-5, abs=1e-4), name


def test_a_head_that_sees_bos_alone_has_no_reach():
    pattern = torch.zeros(1, 1, 3, 3)
    pattern[..., 0] = 1
    scores = HeadScores(1, 1)
    reach.update_reach(scores, 0, pattern)
    found = {row.score: row.value for row in reach.reach_rows(scores)}
    assert "reach" not in found
    assert found["first_token"] == 1
    assert found["entropy"] == 0


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_spectra_against_the_whole_matrices(processing):
    model = tiny_model(processing)
    bridge, layer = model.bridge, 1
    E, weight = double(bridge.W_E), double(bridge.blocks[layer].ln1.weight)
    E = (E - E.mean(1, keepdims=True)) * weight
    U = double(bridge.W_U)
    if processing == "raw":
        U = double(bridge.ln_final.weight)[:, None] * U
    U = U - U.mean(0)
    U = U - U.mean(1, keepdims=True)
    for head, found in enumerate(spectra.spectra(model, layer)):
        W_Q, W_K, W_V = (double(getattr(bridge.blocks[layer].attn, n)[head]) for n in ("W_Q", "W_K", "W_V"))
        W_O = double(bridge.blocks[layer].attn.W_O[head])
        whole = {"OV": (W_V @ W_O, E @ W_V @ W_O @ U), "QK": (W_Q @ W_K.T, E @ W_Q @ W_K.T @ E.T)}
        for circuit, (matrix, tokens) in whole.items():
            values = np.linalg.svd(matrix, compute_uv=False)[:D_HEAD]
            np.testing.assert_allclose(found[circuit].singular_values, values, rtol=1e-6)
            eigen = np.linalg.eigvals(tokens)
            assert eigen.shape == (D_VOCAB,)
            eigen = eigen[np.argsort(-np.abs(eigen))][:D_HEAD]
            mine = found[circuit].eigenvalues.numpy()
            np.testing.assert_allclose(np.abs(mine), np.abs(eigen), rtol=1e-5)
            assert found[circuit].share == pytest.approx(eigen.real.sum() / np.abs(eigen).sum(), rel=1e-5)
            p = values / values.sum()
            rank = math.exp(-sum(x * math.log(x) for x in p))
            assert spectra.effective_rank(found[circuit].singular_values) == pytest.approx(rank, rel=1e-6)


def test_a_head_that_copies_has_eigenvalues_of_one_sign():
    E = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    copies = spectra.Spectrum(torch.ones(6), spectra.low_rank_eigenvalues(E, E.T))
    suppresses = spectra.Spectrum(torch.ones(6), spectra.low_rank_eigenvalues(E, -E.T))
    assert copies.share == pytest.approx(1)
    assert suppresses.share == pytest.approx(-1)


def _layer_norm(x, module, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * double(module.weight) + double(module.bias)


@pytest.mark.parametrize("layer", LAYERS)
def test_copying_and_successors_against_loops(layer):
    model = tiny_model()
    bridge = model.bridge
    tokens = torch.arange(1, D_VOCAB)
    stream = spectra.token_streams(model, tokens, 0, LAYERS)[layer]
    hf = AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager")
    prompts = torch.stack([torch.zeros_like(tokens), tokens], 1)
    with torch.no_grad():
        hidden = hf(prompts, output_hidden_states=True).hidden_states[min(layer, 1)][:, 1]
    torch.testing.assert_close(stream, hidden, rtol=1e-4, atol=1e-4)
    read = _layer_norm(double(hidden), bridge.blocks[layer].ln1, bridge.cfg.eps)
    U = double(bridge.ln_final.weight)[:, None] * double(bridge.W_U)
    U = U - U.mean(0)
    attn, sequence = bridge.blocks[layer].attn, [3, 4, 5, 6, 7]
    found = spectra.copying(model, layer, tokens, stream)
    of_sequence = stream[torch.tensor(sequence) - 1]
    right, pairs = spectra.successors(model, layer, [sequence], [of_sequence])
    assert found.n == D_VOCAB - 1
    assert pairs == 4
    for head in range(N_HEADS):
        logits = read @ double(attn.W_V[head]) @ double(attn.W_O[head]) @ U
        top = sum(sum(row > row[t]) < 10 for t, row in zip(tokens.tolist(), logits, strict=True))
        bottom = sum(sum(row < row[t]) < 10 for t, row in zip(tokens.tolist(), logits, strict=True))
        assert (int(found.top[head]), int(found.bottom[head])) == (top, bottom)
        wins = sum(
            sequence[int(np.argmax([logits[t - 1][s] for s in sequence]))] == t + 1 for t in sequence[:-1]
        )
        assert int(right[head]) == wins


def test_known_sequences_are_runs_of_single_tokens():
    tokenizer = load_tokenizer(tiny_model().files.path)
    assert spectra.known_sequences(tokenizer) == []

    class Words:
        unk_token_id = 0

        def __call__(self, text, **_):
            return {"input_ids": [ord(text[0])] if len(text) == 1 and text in "0123ABD" else [1, 2]}

    assert spectra.known_sequences(Words()) == [[48, 49, 50, 51]]


# ---------------------------------------------------------------- the loss without a head


def _without(head_of_layer, mean):
    """The Hugging Face model with one head's rows of W_O zeroed, and its mean output put into the bias."""
    layer, head = head_of_layer
    hf = AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager").double()
    rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
    with torch.no_grad():
        projection = hf.transformer.h[layer].attn.c_proj
        if mean is not None:
            projection.bias += mean.double() @ projection.weight[rows]
        projection.weight[rows] = 0
    return hf


def test_ablation_is_that_of_the_model_without_the_head():
    model, tokens = tiny_model(), torch.from_numpy(random_tokens(5, 9, 3))
    counted = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    z, _ = capture(model, tokens, [Site("z", layer) for layer in LAYERS])
    means = [z[Site("z", layer)][:, 1:].mean((0, 1)).reshape(N_HEADS, D_HEAD) for layer in LAYERS]
    ticks = []
    found = ablate(model, tokens, counted, means, LAYERS, ticks.append)
    assert sum(ticks) == 5 * N_LAYERS
    assert found.n.tolist() == counted.sum(1).tolist()

    def losses(hf):
        with torch.no_grad():
            log_p = hf(tokens).logits.log_softmax(-1)
        return [
            -sum(float(log_p[b, i, tokens[b, i + 1]]) for i in range(8) if counted[b, i]) for b in range(5)
        ]

    clean = losses(AutoModelForCausalLM.from_pretrained(model_folder()).double())
    np.testing.assert_allclose(found.clean, clean, rtol=1e-5)
    for layer in LAYERS:
        for head in range(N_HEADS):
            for kind, mean in zip(KINDS, (None, means[layer][head]), strict=True):
                expected = losses(_without((layer, head), mean))
                np.testing.assert_allclose(
                    found.without[KINDS.index(kind), layer, head], expected, rtol=2e-5, err_msg=kind
                )


def test_chosen_layers_and_small_batches_give_the_same(monkeypatch):
    model, tokens = tiny_model(), torch.from_numpy(random_tokens(4, 8, 5))
    counted = torch.ones(4, 7, dtype=torch.bool)
    means = [torch.randn(N_HEADS, D_HEAD, generator=torch.Generator().manual_seed(s)) for s in LAYERS]
    whole = ablate(model, tokens, counted, means, LAYERS)
    monkeypatch.setattr("atlas.heads.ablation._MOST_LOGITS", {"cpu": 3 * 8 * D_VOCAB})
    parts = ablate(model, tokens, counted, [means[1]], [1])
    torch.testing.assert_close(parts.without[:, 0], whole.without[:, 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.clean, whole.clean, rtol=1e-6, atol=1e-6)


def test_effects_and_their_error_by_hand():
    clean, without = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 4.0, 9.0]).double()
    found = Ablations(clean, without[None, None, None], torch.tensor([2, 2, 2]))
    assert float(found.effect()) == pytest.approx(9 / 6)
    # Rows of equal length: the error is that of a mean of three row effects 0.5, 1, 3.
    expected = np.std([0.5, 1.0, 3.0], ddof=1) / math.sqrt(3)
    assert float(found.standard_error()) == pytest.approx(expected)
    alone = Ablations(clean[:1], without[None, None, None, :1], torch.tensor([2]))
    assert math.isnan(float(alone.standard_error()))


# ---------------------------------------------------------------- prompts


TASK = TaskConfig("t", "w1 {a} w2[[ {a} w3]] w4", (SlotConfig("a", ("w5", "w6")),))


def test_prompts_mark_what_is_predicted():
    tokenizer = load_tokenizer(tiny_model().files.path)
    made = make_prompts(TASK, tokenizer, 20, bos=0, n_ctx=N_CTX)
    assert made.tokens.shape == (20, 7)
    for text, row in zip(made.texts, made.tokens.tolist(), strict=True):
        words = text.split()
        assert words[1] == words[3]
        assert words[1] in ("w5", "w6")
        assert row == [0, *(int(word[1:]) + 1 for word in words)]
    assert made.counted.tolist() == [[False, False, False, True, True, False]] * 20
    assert {text.split()[1] for text in made.texts} == {"w5", "w6"}
    assert make_prompts(TASK, tokenizer, 20, bos=0, n_ctx=N_CTX).texts == made.texts
    assert make_prompts(TASK, tokenizer, 20, bos=0, n_ctx=N_CTX, seed=1).texts != made.texts


def test_prompts_of_different_length_are_padded_behind():
    tokenizer = load_tokenizer(tiny_model().files.path)
    task = TaskConfig("t", "w1 {a}[[ w2]]", (SlotConfig("a", ("w3", "w4 w5 w6")),))
    made = make_prompts(task, tokenizer, 12, bos=0, n_ctx=N_CTX)
    assert made.tokens.shape[1] == 6
    short = next(i for i, text in enumerate(made.texts) if "w3" in text)
    assert made.tokens[short].tolist() == [0, 2, 4, 3, 0, 0]
    assert made.counted[short].tolist() == [False, False, True, False, False]


def test_random_characters():
    task = TaskConfig("t", "x/[[{id}]]", (SlotConfig("id", characters="ab", length=5),))
    made = make_prompts(task, load_tokenizer(tiny_model().files.path), 8, bos=0, n_ctx=N_CTX)
    assert all(len(text) == 7 and set(text[2:]) <= {"a", "b"} for text in made.texts)
    assert len(set(made.texts)) > 1


@pytest.mark.parametrize(
    ("template", "slots", "said"),
    [
        ("no stretch", (), "one pair of"),
        ("[[first]]", (), "after other text"),
        ("a [[]]", (), "one pair of"),
        ("a [[b]] [[c]]", (), "one pair of"),
        ("a {x}[[b]]", (), "names \\['x'\\]"),
        ("a[[b]]", (SlotConfig("y", ("w",)),), "slots \\['y'\\]"),
    ],
)
def test_templates_that_cannot_be_are_refused(template, slots, said):
    with pytest.raises(ConfigError, match=said):
        TaskConfig("t", template, slots)


def test_tasks_are_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="either words or characters"):
        SlotConfig("a")
    with pytest.raises(ConfigError, match="task name 'a b'"):
        TaskConfig("a b", "a[[b]]")
    with pytest.raises(ConfigError, match="different names"):
        HeadsConfig(task=(TASK, TASK))
    tokenizer = load_tokenizer(tiny_model().files.path)
    with pytest.raises(ConfigError, match="allows 4"):
        make_prompts(TASK, tokenizer, 1, bos=0, n_ctx=4)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tasks(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text('[[task]]\nname = "t"\ntemplat = "a[[b]]"\n')
    with pytest.raises(ConfigError, match="'templat' is not known"):
        read_tasks(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match="has no"):
        read_tasks(tmp_path / "empty.toml")


def test_bundled_tasks_and_more():
    assert [task.name for task in all_tasks(())] == ["digit-copy", "url"]
    assert [task.name for task in all_tasks((TASK,))] == ["digit-copy", "url", "t"]
    own = TaskConfig("url", "a[[b]]")
    assert own in all_tasks((own,))
    assert len(all_tasks((own,))) == 2


# ---------------------------------------------------------------- prefixes


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 14), st.integers(2, 4), st.integers(1, 5), st.integers(0, 200))
def test_match_lengths_against_loops(positions: int, words: int, longest: int, seed: int):
    tokens = np.random.default_rng(seed).integers(1, words + 1, positions)
    tokens[0] = 0
    found = prefixes.match_lengths(torch.from_numpy(tokens)[None], longest)[0]
    for i in range(positions):
        for j in range(positions):
            n = 0
            while j < i and n < longest and j - 1 - n >= 1 and tokens[i - n] == tokens[j - 1 - n]:
                n += 1
            assert int(found[i, j]) == n, (tokens, i, j)


def test_counts_of_matches_against_loops():
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 4, (3, 12)))
    pattern = causal_pattern(3, 2, 12)
    matches = prefixes.match_lengths(tokens)
    found = prefixes.count_matches(pattern, matches)
    for head in range(2):
        for t, threshold in enumerate(prefixes.THRESHOLDS):
            expected = [0] * (prefixes.COUNTED + 1)
            for b in range(3):
                for i in range(1, 12):
                    for j in range(1, 12):
                        if float(pattern[b, head, i, j]) > threshold:
                            expected[int(matches[b, i, j])] += 1
            assert found[head, t].tolist() == expected
    assert int(found[:, 0, 1:].sum()) > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(5, 40), st.integers(12, 60), st.integers(0, 50))
def test_prefix_sequences_match_exactly_as_far_as_they_say(n: int, length: int, d_vocab: int, seed: int):
    made = prefixes.prefix_sequences(n, length, d_vocab, bos=0, seed=seed)
    length = made.tokens.shape[2]
    assert length <= min(40, d_vocab - 1)
    for rows, source, answer in zip(made.tokens, made.source.tolist(), made.answer.tolist(), strict=True):
        assert (rows[:, 0] == 0).all()
        for k, row in enumerate(rows, 1):
            assert int(row[source]) == answer
            lengths = prefixes.match_lengths(row[None], length)[0]
            assert int(lengths[-1, source]) == k
            # Nothing else matches the last token, and the answer stands nowhere else.
            assert int((lengths[-1] > 0).sum()) == 1
            assert int((row == answer).sum()) == 1
        before = rows[:, : length - len(rows)]
        assert (before == before[:1]).all()


def test_impossible_prefix_sequences_are_refused():
    with pytest.raises(ConfigError, match="at least 1 of at least 5"):
        prefixes.prefix_sequences(1, 4, 100, bos=0, seed=0)
    with pytest.raises(ConfigError, match="0 of 24"):
        prefixes.prefix_sequences(0, 24, 100, bos=0, seed=0)


@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_prefix_curve_against_one_sequence_at_a_time(processing):
    model = tiny_model(processing)
    bridge = model.bridge
    made = prefixes.prefix_sequences(3, N_CTX, D_VOCAB, bos=0, seed=2)
    found = prefixes.prefix_curve(model, made, batch=4)
    longest = made.tokens.shape[1]
    U = double(bridge.W_U)
    if processing == "raw":
        U = double(bridge.ln_final.weight)[:, None] * U
    U = U - U.mean(0)
    U = U - U.mean(1, keepdims=True)
    attention = np.zeros((N_LAYERS, N_HEADS, longest))
    dla = np.zeros_like(attention)
    for rows, source in zip(made.tokens, made.source.tolist(), strict=True):
        for k in range(longest):
            names = [f"blocks.{layer}.attn.hook_{what}" for layer in LAYERS for what in ("pattern", "z")]
            _, raw = capture(model, rows[k][None], (), [*names, f"blocks.{N_LAYERS - 1}.hook_resid_post"])
            stream = double(raw[f"blocks.{N_LAYERS - 1}.hook_resid_post"][0, -1])
            scale = math.sqrt(((stream - stream.mean()) ** 2).mean() + bridge.cfg.eps)
            for layer in LAYERS:
                pattern = raw[f"blocks.{layer}.attn.hook_pattern"][0, :, -1, source]
                attention[layer, :, k] += double(pattern) / 3
                for head in range(N_HEADS):
                    z = double(raw[f"blocks.{layer}.attn.hook_z"][0, -1, head])
                    written = z @ double(bridge.blocks[layer].attn.W_O[head])
                    dla[layer, head, k] += written @ U[:, int(rows[k][source])] / scale / 3
    np.testing.assert_allclose(found.attention, attention, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.dla, dla, rtol=1e-3, atol=1e-4)
    assert found.n == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 16), st.integers(2, 5), st.integers(0, 300))
def test_cut_matches_keep_one_token_and_nothing_else_changes(positions: int, words: int, seed: int):
    blocks = torch.from_numpy(np.random.default_rng(seed).integers(1, words + 1, (3, positions)))
    blocks[:, 0] = 0
    found = prefixes.long_matches(blocks, words + 1, bos=0, seed=seed)
    for row, cut, i, j in zip(*found, strict=True):
        before, after = (prefixes.match_lengths(x[None], positions)[0, i, j] for x in (row, cut))
        assert int(before) >= 2
        assert int(after) == 1
        changed = (row != cut).nonzero()[:, 0].tolist()
        assert changed == list(range(int(i) - int(before) + 1, int(i)))
        assert int(j) < min(changed)
        assert (cut[1:] > 0).all()


def test_corruption_against_single_passes():
    model = tiny_model()
    tokens = torch.from_numpy(random_tokens(6, 12, 1))
    tokens[:, 6:9] = tokens[:, 1:4]
    found = prefixes.long_matches(tokens, D_VOCAB, bos=0, seed=0)
    assert len(found.query) == 6
    measured = prefixes.corruption(model, found, batch=4)
    for which, rows in enumerate((found.tokens, found.corrupted)):
        for e, row in enumerate(rows):
            _, raw = capture(model, row[None], (), [f"blocks.{layer}.attn.hook_pattern" for layer in LAYERS])
            for layer in LAYERS:
                at = raw[f"blocks.{layer}.attn.hook_pattern"][0, :, found.query[e], found.key[e]]
                np.testing.assert_allclose(measured[which][layer, :, e], at, rtol=1e-5, atol=1e-7)


def test_a_text_without_matches_has_no_pairs():
    found = prefixes.long_matches(torch.arange(12).reshape(1, 12), 20, bos=0, seed=0)
    assert len(found.query) == 0
    assert prefixes.corruption(tiny_model(), found).before.shape == (N_LAYERS, N_HEADS, 0)


# ---------------------------------------------------------------- all of it


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    tokens = random_tokens(10, 12)
    tokens[:, 7:10] = tokens[:, 2:5]
    store = TokenStore(save_store(tmp_path_factory.mktemp("text") / "t", tokens))
    config = HeadsConfig(ablation_blocks=3, prompts=2, repeats=4, task=(TASK,))
    return store, measure_heads(tiny_model(), store, 6, config, NullProgress())


def test_every_head_has_every_row(measured):
    _, found = measured
    heads = N_LAYERS * N_HEADS
    scores = {row["score"] for row in found["head_scores"]}
    assert scores >= {
        "previous_token", "duplicate", "induction", "duplicate_text", "induction_text", *reach.SCORES,
        "copying", "matching", "copying_top10", "copy_suppression", "ablation_zero", "ablation_mean",
        "ov_rank", "qk_rank",
    }  # fmt: skip
    assert len(found["head_scores"]) == heads * len(scores)
    assert len(found["head_spectra"]) == heads * 2
    assert len(found["head_prefixes"]) == heads * 9
    assert len(found["head_text_prefixes"]) == heads * len(prefixes.THRESHOLDS) * 11
    assert len(found["head_corruption"]) == heads
    assert [row["task"] for row in found["tasks"]] == ["digit-copy", "url", "t"]
    assert len(found["head_task_effects"]) == heads * 3 * 2
    for name, rows in found.items():
        names = TABLES[name].schema.names
        table = as_table(name, {column: [row.get(column) for row in rows] for column in names})
        assert len(table.group_by(list(TABLES[name].key)).aggregate([])) == len(rows)


def test_ablation_scores_are_those_of_the_first_blocks_with_means_of_the_text(measured):
    store, found = measured
    model, text = tiny_model(), torch.from_numpy(store.blocks(range(6)))
    z, _ = capture(model, text, [Site("z", layer) for layer in LAYERS])
    means = [z[Site("z", layer)][:, 1:].mean((0, 1)).reshape(N_HEADS, D_HEAD) for layer in LAYERS]
    effects = ablate(model, text[:3], torch.ones(3, 11, dtype=torch.bool), means, LAYERS).effect()
    for row in found["head_scores"]:
        if row["score"].startswith("ablation_"):
            kind = KINDS.index(row["score"].removeprefix("ablation_"))
            assert row["value"] == pytest.approx(float(effects[kind, row["layer"], row["head"]]), abs=1e-6)
            assert row["n"] == 33


def test_tasks_alone_are_the_same(measured):
    store, found = measured
    text = torch.from_numpy(store.blocks(range(6)))
    config = HeadsConfig(prompts=2, task=(TASK,))
    alone = measure_tasks(tiny_model(), text, config, [1], 0, NullProgress())
    same = [row for row in found["head_task_effects"] if row["task"] == "t" and row["layer"] == 1]
    assert len(alone["head_task_effects"]) == len(same) == N_HEADS * 2
    for mine, other in zip(alone["head_task_effects"], same, strict=True):
        assert mine.keys() == other.keys()
        assert mine["effect"] == pytest.approx(other["effect"], abs=1e-6)


def test_nothing_is_ablated_where_nothing_is_asked(measured):
    store, _ = measured
    config = HeadsConfig(ablation_blocks=0, prompts=0, repeats=1)
    found = measure_heads(tiny_model(), store, 2, config, NullProgress())
    assert not found["tasks"]
    assert not any(row["score"].startswith("ablation") for row in found["head_scores"])
