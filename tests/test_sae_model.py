"""SAEs in use and on disk, the sums of their metrics, and evaluation inside the model."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from atlas.corpus.tokens import TokenStore
from atlas.errors import SAEError
from atlas.progress import NullProgress
from atlas.sae import evaluate as evaluation
from atlas.sae.evaluate import evaluate
from atlas.sae.files import load_sae, save_sae
from atlas.sae.metrics import ReconstructionSums
from atlas.sae.model import SAE

from .tiny import D_HEAD, D_MODEL, N_HEADS, model_folder, random_sae, random_tokens, save_store, tiny_model


def encode_by_hand(sae, x):
    """(x - b_dec) W_enc + b_enc, the k largest with ties to the lower index, ReLU; in float64."""
    pre = (x - sae.b_dec).double().numpy() @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    f = np.maximum(pre, 0)
    if sae.info.k is not None:
        for row, out in zip(pre, f, strict=True):
            keep = np.argsort(-row, kind="stable")[: sae.info.k]
            out[np.setdiff1d(np.arange(len(row)), keep)] = 0
    return f


@pytest.mark.parametrize("k", [None, 1, 4, 20])
def test_encode_decode_and_active(k):
    sae, x = random_sae(k=k), torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(1))
    f = encode_by_hand(sae, x)
    np.testing.assert_allclose(sae.encode(x).numpy(), f, atol=1e-5)
    active = sae.active(x)
    row, feature = np.nonzero(f)
    assert (active.row.tolist(), active.feature.tolist()) == (row.tolist(), feature.tolist())
    np.testing.assert_allclose(active.value.numpy(), f[row, feature], atol=1e-5)
    x_hat = f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    np.testing.assert_allclose(sae.reconstruct(x).numpy(), x_hat, atol=1e-5)
    shaped = x.reshape(3, 3, D_MODEL)
    assert sae.reconstruct(shaped).shape == shaped.shape
    torch.testing.assert_close(sae.reconstruct(shaped).reshape(9, -1), sae.reconstruct(x))


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


def hf_run(hf, sae, edit):
    """Log probabilities in float64 with z edited through the layer's c_proj, and z as it was."""
    seen = []
    head = sae.info.site.head
    part = slice(None) if head is None else slice(head * D_HEAD, (head + 1) * D_HEAD)

    def hook(module, args):
        z = args[0].clone()
        seen.append(z[..., part].clone())
        z[..., part] = edit(z[..., part])
        return (z,)

    handle = hf.transformer.h[sae.info.site.layer].attn.c_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = hf(torch.from_numpy(TOKENS[:BLOCKS])).logits
    handle.remove()
    return logits.double().log_softmax(-1), seen[0]


def mean_ce(log_p):
    places = [(b, p) for b in range(BLOCKS) for p in range(TOKENS.shape[1] - 1)]
    return -sum(log_p[b, p, TOKENS[b, p + 1]].item() for b, p in places) / len(places)


SAES = [
    random_sae("L00.z", k=4, scale=0.6),
    random_sae("L01.z", seed=1, scale=0.6),
    random_sae("L01.H02.z", d_in=D_HEAD, k=3, seed=2),
]


def test_evaluation_against_hooks_on_the_models_own_modules(hf, store, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_BLOCKS", 2)
    rows = evaluate(tiny_model(), SAES, store, BLOCKS, NullProgress())
    assert [(r["sae"], r["split"]) for r in rows] == [
        (s.info.name, split) for s in SAES for split in ("eval", "eval_with_bos")
    ]
    for sae, row, with_bos in zip(SAES, rows[::2], rows[1::2], strict=True):
        clean, z = hf_run(hf, sae, lambda x: x)
        x = z[:, 1:].reshape(-1, sae.d_in).double().numpy()
        mean = torch.from_numpy(x.mean(0)).float()
        spliced, _ = hf_run(hf, sae, sae.reconstruct)
        zero, _ = hf_run(hf, sae, torch.zeros_like)
        means, _ = hf_run(hf, sae, lambda x, mean=mean: mean.expand_as(x))
        runs = {"clean": clean, "spliced": spliced, "zero": zero, "mean": means}
        ce = {name: mean_ce(log_p) for name, log_p in runs.items()}
        for name, value in ce.items():
            assert row[f"ce_{name}"] == pytest.approx(value, abs=2e-5), name
            assert with_bos[f"ce_{name}"] == row[f"ce_{name}"]
        kl = (clean.exp() * (clean - spliced)).sum(-1)[:, :-1].mean().item()
        assert row["kl"] == pytest.approx(kl, abs=2e-5)
        assert row["ce_recovered"] == pytest.approx(
            (row["ce_zero"] - row["ce_spliced"]) / (row["ce_zero"] - row["ce_clean"]), rel=1e-9
        )
        f = encode_by_hand(sae, torch.from_numpy(x).float())
        x_hat = f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
        assert row["n_tokens"] == len(x) == BLOCKS * 7
        assert with_bos["n_tokens"] == BLOCKS * 8
        assert row["l0"] == pytest.approx((f > 0).sum(1).mean())
        explained = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert row["variance_explained"] == pytest.approx(explained, abs=1e-4)
        assert row["alive"] == (f > 0).any(0).sum()


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


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("sae", SAES, ids=lambda s: s.info.name)
def test_files_keep_every_bit(tmp_path, sae):
    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.info == sae.info
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name))
    assert again.digest() == sae.digest()


@pytest.fixture
def saved(tmp_path):
    save_sae(SAES[0], tmp_path / "sae")
    return tmp_path / "sae"


def refused(folder):
    with pytest.raises(SAEError) as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("damage", ["missing", "nan", "infinite", "shape", "flat"])
def test_damaged_tensors_are_refused_by_name(saved, name, damage):
    tensors = load_file(saved / "sae_weights.safetensors")
    old = tensors.pop(name)
    if damage in ("nan", "infinite"):
        old.view(-1)[-1] = float("nan" if damage == "nan" else "-inf")
    new = {"shape": old[:-1].contiguous(), "flat": torch.zeros(())}.get(damage, old)
    save_file(tensors if damage == "missing" else tensors | {name: new}, saved / "sae_weights.safetensors")
    message = refused(saved)
    assert name in message or "W_enc" in message


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff\xfe\x00", b"[]", b"{}", b"null", b'"x"'])
def test_garbage_is_refused(saved, file, content):
    (saved / file).unlink()
    if content is not None:
        (saved / file).write_bytes(content)
    refused(saved)


@pytest.mark.parametrize("keep", [1, 8, 100, -1])
def test_truncated_weights_are_refused(saved, keep):
    path = saved / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"site": "nonsense"},
        {"site": 5},
        {"extra": 1},
        {"k": 21},
        {"k": 0},
        {"k": "many"},
        {"architecture": "gru"},
    ],
    ids=str,
)
def test_metadata_that_make_no_sense_are_refused(saved, change):
    config = json.loads((saved / "cfg.json").read_text())
    config["metadata"]["head_atlas"] |= change
    (saved / "cfg.json").write_text(json.dumps(config))
    refused(saved)


HEAD_ATLAS = ("metadata", "head_atlas")
PATHS = [("d_in",), ("metadata",), (*HEAD_ATLAS, "site"), (*HEAD_ATLAS, "model")]


@pytest.mark.parametrize("path", PATHS)
def test_missing_keys_are_refused(saved, path):
    config = json.loads((saved / "cfg.json").read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    (saved / "cfg.json").write_text(json.dumps(config))
    refused(saved)
