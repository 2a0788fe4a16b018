"""Metrics against brute force, and evaluation against edits of the Hugging Face model's own modules."""

from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.configs import ARCHITECTURES, NORMALISATIONS, SPARSE_BY_K
from atlas.corpus.tokens import TokenStore
from atlas.pipeline.inputs import write_rows
from atlas.progress import NullProgress
from atlas.sae import evaluate as evaluation
from atlas.sae.evaluate import evaluate
from atlas.sae.metrics import ReconstructionSums, cross_entropy_sum, kl_sum, predictions
from atlas.sae.model import SAE
from atlas.store.parquet import read_table

from .tiny import D_HEAD, D_MODEL, N_HEADS, model_folder, random_sae, random_tokens, save_store, tiny_model

# ---------------------------------------------------------------- sums


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 8), min_size=1, max_size=4).filter(lambda s: sum(s) > 1))
def test_metrics_by_brute_force_and_by_batches(seed, sizes):
    rng, n = np.random.default_rng(seed), sum(sizes)
    x = rng.normal(size=(n, 3)) + 2
    x_hat = x + rng.normal(size=(n, 3))
    fired = [rng.permutation(6)[: rng.integers(0, 4)] for _ in range(n)]
    sums, start = ReconstructionSums(3, 6), 0
    for size in sizes:
        here = slice(start, start + size)
        features = np.concatenate([*fired[here], np.empty(0, np.int64)]).astype(np.int64)
        sums.update(torch.from_numpy(x[here]), torch.from_numpy(x_hat[here]), torch.from_numpy(features))
        start += size
    m = sums.metrics()
    assert m["l0"] == pytest.approx(sum(map(len, fired)) / n)
    assert m["mse"] == pytest.approx(
        sum((a - b) ** 2 for a, b in zip(x.flat, x_hat.flat, strict=True)) / n / 3
    )
    explained = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert m["variance_explained"] == pytest.approx(explained, rel=1e-9)
    norms = [(np.linalg.norm(a), np.linalg.norm(b)) for a, b in zip(x, x_hat, strict=True)]
    cosines = [a @ b / p / q for a, b, (p, q) in zip(x, x_hat, norms, strict=True)]
    assert m["cosine"] == pytest.approx(sum(cosines) / n)
    assert m["l2_ratio"] == pytest.approx(sum(q / p for p, q in norms) / n)
    alive = len({int(f) for row in fired for f in row})
    assert (m["alive"], m["dead"]) == (alive, 6 - alive)


def test_merged_sums_are_the_sums_of_both():
    g = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(2, 9, 3, generator=g)
    features = torch.tensor([0, 5, 5, 2])
    whole, first, second = (ReconstructionSums(3, 6) for _ in range(3))
    whole.update(x, x_hat, features)
    first.update(x[:4], x_hat[:4], features[:1])
    second.update(x[4:], x_hat[4:], features[1:])
    assert first.merge(second).metrics() == pytest.approx(whole.metrics())
    assert first.merge(second).n == 9
    assert first.n == 4, "merging leaves both alone"


def test_cross_entropy_and_kl_by_loops():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 7, generator=g)
    tokens = torch.randint(7, (3, 4), generator=g)
    p, q = (t.double().log_softmax(-1).numpy() for t in (a, b))
    places = [(i, j) for i in range(3) for j in range(3)]
    ce = -sum(p[i, j, tokens[i, j + 1]] for i, j in places)
    kl = sum(np.exp(p[i, j, v]) * (p[i, j, v] - q[i, j, v]) for i, j in places for v in range(7))
    assert cross_entropy_sum(predictions(a), tokens) == pytest.approx(ce, rel=1e-6)
    assert kl_sum(predictions(a), predictions(b)) == pytest.approx(kl, rel=1e-5)


# ---------------------------------------------------------------- evaluation

TOKENS = random_tokens(6, 8, seed=4)
BLOCKS = 5


@pytest.fixture(scope="module")
def hf():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(save_store(tmp_path_factory.mktemp("evaluate") / "store", TOKENS))


@contextmanager
def edited(hf, site, edit, seen):
    """Inside, the site is edited in the module that holds it, and ``seen`` gets it as it was."""
    block = hf.transformer.h[site.layer]
    first = 0 if site.head is None else site.head * D_HEAD
    if site.kind in "qkv":
        first += "qkv".index(site.kind) * D_MODEL
    part = slice(first, first + (D_MODEL if site.head is None else D_HEAD))

    def change(held):
        out = held.clone()
        seen.append(held[..., part].clone())
        out[..., part] = edit(held[..., part])
        return out

    def before(module, args):
        return (change(args[0]), *args[1:])

    def after(module, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = {
        "z": lambda: block.attn.c_proj.register_forward_pre_hook(before),
        "resid_pre": lambda: block.register_forward_pre_hook(before),
        "attn_out": lambda: block.attn.c_proj.register_forward_hook(after),
        "mlp_out": lambda: block.mlp.register_forward_hook(after),
    }.get(site.kind, lambda: block.attn.c_attn.register_forward_hook(after))()
    try:
        yield
    finally:
        handle.remove()


def hf_run(hf, edits):
    """Log probabilities in float64 with sites edited, and each site as it was."""
    seen = {site: [] for site in edits}
    with ExitStack() as stack, torch.no_grad():
        for site, edit in edits.items():
            stack.enter_context(edited(hf, site, edit, seen[site]))
        logits = hf(torch.from_numpy(TOKENS[:BLOCKS])).logits
    return logits.double().log_softmax(-1), {site: held[0] for site, held in seen.items()}


def mean_ce(log_p):
    places = [(b, p) for b in range(BLOCKS) for p in range(TOKENS.shape[1] - 1)]
    return -sum(log_p[b, p, TOKENS[b, p + 1]].item() for b, p in places) / len(places)


def reconstruct_by_hand(sae, x):
    """(f, x^) in float64 numpy from the raw tensors and the formulas of each architecture."""
    t = {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
    x, mean, size = x.double().numpy(), 0.0, 1.0
    if sae.info.normalize_activations == "layer_norm":
        mean, size = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True) + 1e-5
    elif sae.info.normalize_activations == "constant_norm_rescale":
        size = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(x.shape[1])
    linear = ((x - mean) / size - t["b_dec"]) @ t["W_enc"]
    if sae.info.architecture == "gated":
        f = np.maximum(linear * np.exp(t["r_mag"]) + t["b_enc"], 0) * (linear + t["b_gate"] > 0)
    else:
        pre = linear + t["b_enc"]
        f = np.maximum(pre, 0) if "threshold" not in t else pre * (pre > t["threshold"]) * (pre > 0)
        if sae.info.architecture == "topk":
            for row, out in zip(pre, f, strict=True):
                out[np.argsort(-row, kind="stable")[sae.info.k :]] = 0
    return f, (f @ t["W_dec"] + t["b_dec"]) * size + mean


def by_hand(sae):
    """The edit that replaces a site by its reconstruction."""

    def edit(held):
        return (
            torch.from_numpy(reconstruct_by_hand(sae, held.reshape(-1, sae.d_in))[1]).to(held).view_as(held)
        )

    return edit


def sae_at(name, **how):
    return random_sae(name, d_in=D_HEAD if ".H" in name else D_MODEL, scale=how.pop("scale", 0.6), **how)


SAES = [
    sae_at("L00.z", k=4),
    sae_at("L01.z", seed=1),
    sae_at("L01.H02.z", k=3, seed=2),
    sae_at("L00.H01.q", seed=3),
    sae_at("L01.H00.q", k=3, seed=4),
    sae_at("L01.H00.k", k=3, seed=5),
    sae_at("L00.H02.k", seed=6),
    sae_at("L00.H02.v", k=3, seed=7),
    sae_at("L01.resid_pre", seed=8),
    sae_at("L00.resid_pre", k=4, seed=9),
    sae_at("L00.attn_out", seed=10),
    sae_at("L01.mlp_out", k=4, seed=11),
]
KINDS = [
    sae_at("L00.z", architecture=a, k=4 if a in SPARSE_BY_K else None, seed=i, normalize_activations=how)
    for i, (a, how) in enumerate((a, how) for a in ARCHITECTURES for how in NORMALISATIONS)
]


def check(hf, sae, row, with_bos):
    site = sae.info.site
    clean, inside = hf_run(hf, {site: lambda x: x})
    x = inside[site][:, 1:].reshape(-1, sae.d_in)
    mean = x.double().mean(0).float()
    edits = {"spliced": by_hand(sae), "zero": torch.zeros_like, "mean": lambda held: mean.expand_as(held)}
    runs = {"clean": clean} | {name: hf_run(hf, {site: edit})[0] for name, edit in edits.items()}
    for name, log_p in runs.items():
        assert row[f"ce_{name}"] == pytest.approx(mean_ce(log_p), abs=3e-5), name
        assert with_bos[f"ce_{name}"] == row[f"ce_{name}"]
    kl = (clean.exp() * (clean - runs["spliced"])).sum(-1)[:, :-1].mean().item()
    assert row["kl"] == pytest.approx(kl, abs=3e-5)
    ce = {name: row[f"ce_{name}"] for name in runs}
    for suffix, base in (("", "zero"), ("_mean", "mean")):
        expected = (ce[base] - ce["spliced"]) / (ce[base] - ce["clean"])
        assert row[f"ce_recovered{suffix}"] == pytest.approx(expected, rel=1e-9)
    for found, held in ((row, x), (with_bos, inside[site].reshape(-1, sae.d_in))):
        f, x_hat = reconstruct_by_hand(sae, held)
        wide = held.double().numpy()
        assert found["n_tokens"] == len(wide)
        assert found["l0"] == pytest.approx((f > 0).sum(1).mean())
        assert found["mse"] == pytest.approx(((wide - x_hat) ** 2).mean(), rel=1e-4)
        explained = 1 - ((wide - x_hat) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum()
        assert found["variance_explained"] == pytest.approx(explained, abs=1e-4, rel=1e-4)
        assert found["alive"] == (f > 0).any(0).sum()


@pytest.mark.parametrize("saes", [SAES, KINDS[:9], KINDS[9:]], ids=["sites", "kinds", "more kinds"])
def test_evaluation_against_hooks_on_the_models_own_modules(hf, store, monkeypatch, saes):
    """At every kind of site, for every architecture and normalisation, in several batches and parts."""
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 16)
    monkeypatch.setattr(evaluation, "_MOST_ACTS", 100)
    saes = [
        SAE(s.info.__class__(**{**vars(s.info), "name": f"{i}"}), **s.tensors()) for i, s in enumerate(saes)
    ]
    rows = evaluate(tiny_model(), saes, store, BLOCKS, NullProgress())
    assert [(r["sae"], r["split"]) for r in rows] == [
        (s.info.name, split) for s in saes for split in ("eval", "eval_with_bos")
    ]
    for sae, row, with_bos in zip(saes, rows[::2], rows[1::2], strict=True):
        check(hf, sae, row, with_bos)


def test_a_perfect_sae_costs_nothing(store):
    """Each coordinate and its negative as two features: x^ = x."""
    eye = torch.eye(D_MODEL)
    zeros = torch.zeros(2 * D_MODEL), torch.zeros(D_MODEL)
    sae = SAE(random_sae("L01.z").info, torch.cat([eye, -eye], 1), zeros[0], torch.cat([eye, -eye]), zeros[1])
    row = evaluate(tiny_model(), [sae], store, BLOCKS, NullProgress())[0]
    assert row["variance_explained"] == pytest.approx(1, abs=1e-9)
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["ce_recovered"] == pytest.approx(1, abs=1e-5)
    assert sae.d_in == N_HEADS * D_HEAD


def test_batches_and_company_do_not_matter(store, monkeypatch):
    """An SAE's row is the same alone, among others, and in batches of one block."""
    together = evaluate(tiny_model(), SAES, store, BLOCKS, NullProgress())
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 1)
    for i in (0, 3, 8):
        alone = evaluate(tiny_model(), [SAES[i]], store, BLOCKS, NullProgress())
        assert alone[0] == pytest.approx(together[2 * i], abs=1e-5)


def test_ablations_are_run_once_per_site(store, monkeypatch):
    """Three SAEs at one site: one splice each, one zero and one mean pass, and the clean pass."""
    passes = []
    run = evaluation.logits_with
    monkeypatch.setattr(evaluation, "logits_with", lambda *a: passes.append(a[2]) or run(*a))
    saes = [sae_at("L01.z", d_sae=n) for n in (8, 16, 24)]
    evaluate(tiny_model(), saes, store, BLOCKS, NullProgress())
    assert len(passes) == 1 + 3 + 1 + 1
    passes.clear()
    evaluate(tiny_model(), [sae_at("L01.H00.q"), sae_at("L01.H00.k")], store, BLOCKS, NullProgress())
    assert len(passes) == 1 + 2 + 1 + 1 + 1, "both rebuilt; zero once for both; a mean of k is even too"


# ---------------------------------------------------------------- q and k in the model


PATTERN = ("pattern_kl", "pattern_top1", "score_correlation", "ce_pattern", "ce_pattern_recovered")


def row_of(rows, sae):
    return next(r for r in rows if r["sae"] == sae.info.name and r["split"] == "eval")


def pattern_by_hand(q, k):
    """[blocks, pos, pos] by loops, in float64, with the scores."""
    q, k = q.double().numpy(), k.double().numpy()
    blocks, n, _ = q.shape
    scores, pattern = np.full((blocks, n, n), np.nan), np.zeros((blocks, n, n))
    for b in range(blocks):
        for i in range(n):
            for j in range(i + 1):
                scores[b, i, j] = sum(q[b, i] * k[b, j]) / D_HEAD**0.5
            e = np.exp(scores[b, i, : i + 1] - scores[b, i, : i + 1].max())
            pattern[b, i, : i + 1] = e / e.sum()
    return scores, pattern


def check_patterns(row, true, hats):
    (s, p), (s_hat, p_hat) = pattern_by_hand(*true), pattern_by_hand(*hats)
    n = TOKENS.shape[1]
    queries = [(b, i) for b in range(BLOCKS) for i in range(1, n)]
    kl = [sum(p[b, i, j] * np.log(p[b, i, j] / p_hat[b, i, j]) for j in range(i + 1)) for b, i in queries]
    same = [p[b, i].argmax() == p_hat[b, i].argmax() for b, i in queries]
    pairs = np.array(
        [
            (s[b, i, j] - s[b, i, : i + 1].mean(), s_hat[b, i, j] - s_hat[b, i, : i + 1].mean())
            for b in range(BLOCKS)
            for i in range(n)
            for j in range(i + 1)
        ]
    )
    assert row["pattern_kl"] == pytest.approx(np.mean(kl), rel=1e-4, abs=1e-6)
    assert row["pattern_top1"] == pytest.approx(np.mean(same))
    assert row["score_correlation"] == pytest.approx(np.corrcoef(pairs.T)[0, 1], abs=1e-5)


def test_patterns_of_partners_against_the_models_own_modules(hf, store):
    rows = evaluate(tiny_model(), SAES, store, BLOCKS, NullProgress())
    q, k = SAES[4], SAES[5]
    sites = q.info.site, k.info.site
    clean, inside = hf_run(hf, dict.fromkeys(sites, lambda x: x))
    both, _ = hf_run(hf, {sites[0]: by_hand(q), sites[1]: by_hand(k)})
    zero, _ = hf_run(hf, dict.fromkeys(sites, torch.zeros_like))
    true = [inside[site] for site in sites]
    for sae, other in ((q, k), (k, q)):
        row = row_of(rows, sae)
        assert row["partner"] == other.info.name
        assert row["ce_pattern"] == pytest.approx(mean_ce(both), abs=3e-5)
        expected = (mean_ce(zero) - mean_ce(both)) / (mean_ce(zero) - mean_ce(clean))
        assert row["ce_pattern_recovered"] == pytest.approx(expected, abs=2e-3)
        check_patterns(row, true, [by_hand(q)(true[0]), by_hand(k)(true[1])])


@pytest.mark.parametrize("sae", [SAES[3], SAES[6]], ids=lambda s: s.info.name)
def test_patterns_without_a_partner_keep_the_other_side(hf, store, sae):
    row = row_of(evaluate(tiny_model(), SAES, store, BLOCKS, NullProgress()), sae)
    site = sae.info.site
    sites = [type(site)(kind, site.layer, site.head) for kind in "qk"]
    _, inside = hf_run(hf, dict.fromkeys(sites, lambda x: x))
    true = [inside[s] for s in sites]
    hats = [by_hand(sae)(x) if s == site else x for s, x in zip(sites, true, strict=True)]
    assert row["partner"] is None
    assert row["ce_pattern"] == row["ce_spliced"]
    assert row["ce_pattern_recovered"] == row["ce_recovered"]
    check_patterns(row, true, hats)


@pytest.mark.parametrize("sae", [SAES[0], SAES[7], SAES[8]], ids=lambda s: s.info.name)
def test_other_sites_have_no_pattern_columns(store, sae):
    rows = evaluate(tiny_model(), [sae], store, BLOCKS, NullProgress())
    assert not {"partner", "pattern_kl", "ce_pattern"} & set(rows[0])


def test_without_patterns_each_side_is_ablated_on_its_own(store, monkeypatch):
    """Where a pattern is more than a softmax of q . k, the columns are left out; the others do not change."""
    saes = SAES[4:6]
    known = evaluate(tiny_model(), saes, store, BLOCKS, NullProgress())
    monkeypatch.setattr(evaluation, "follows_scores", lambda *_: False)
    for row, before in zip(evaluate(tiny_model(), saes, store, BLOCKS, NullProgress()), known, strict=True):
        assert "pattern_kl" not in row
        assert {name for name in before if name not in row} == {"partner", *PATTERN}
        numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
        assert numbers == pytest.approx({name: before[name] for name in numbers}, abs=1e-5, rel=1e-4)


def test_a_mean_over_nothing_is_null(store, tmp_path):
    row = evaluate(tiny_model(), SAES[:1], store, BLOCKS, NullProgress())[0]
    write_rows(tmp_path, "sae_metrics", [row | {"pattern_kl": float("nan")}])
    assert read_table(tmp_path / "sae_metrics.parquet", "sae_metrics")["pattern_kl"].to_pylist() == [None]


def test_rows_of_every_site_fit_the_table(store, tmp_path):
    """What other sites lack is NULL."""
    rows = evaluate(tiny_model(), SAES, store, BLOCKS, NullProgress())
    write_rows(tmp_path, "sae_metrics", rows)
    table = read_table(tmp_path / "sae_metrics.parquet", "sae_metrics").to_pylist()
    assert len(table) == 2 * len(SAES)
    by_name = {sae.info.name: sae.info.site.kind for sae in SAES}
    for row in table:
        assert (row["pattern_kl"] is not None) == (by_name[row["sae"]] in "qk")
        partner = {SAES[4].info.name: SAES[5].info.name, SAES[5].info.name: SAES[4].info.name}
        assert row["partner"] == partner.get(row["sae"])
