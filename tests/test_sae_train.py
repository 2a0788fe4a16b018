"""The training loop: schedule, exact resume, damaged checkpoints, members alone, objectives, logs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas.configs import ModelConfig, SAEConfig, TrainConfig
from atlas.corpus.sources import Document
from atlas.corpus.tokens import TokenStore, build_token_store, load_tokenizer
from atlas.errors import ConfigError, CorpusError, SAEError
from atlas.lm.files import find_model
from atlas.lm.load import load_model
from atlas.progress import NullProgress
from atlas.sae.files import load_sae, save_sae
from atlas.sae.harvest import Harvest, Stream, rounded
from atlas.sae.objectives import kl_loss, pattern_loss, scores_loss
from atlas.sae.train import Training, learning_rate
from atlas.sites import Site, partner

SITES = (Site("z", 0), Site("z", 1), Site("q", 1, 3))
SAES = (
    SAEConfig("topk", d_sae=48, k=6, aux_k=4),
    SAEConfig("relu", d_sae=32, l1_coefficient=1.0, dead_features="resample", resample_tokens=900),
    SAEConfig("relu", d_sae=32, l1_coefficient=9.0, dead_features="resample", resample_tokens=900, label="b"),
)
OTHERS = (
    SAEConfig("batchtopk", d_sae=48, k=4, aux_k=4, normalize_activations="layer_norm"),
    SAEConfig("matryoshka", d_sae=48, k=4, normalize_activations="constant_norm_rescale"),
    SAEConfig("jumprelu", d_sae=32, dead_features="ghost"),
    SAEConfig("gated", d_sae=32, decoder_bias=False, tied_start=False),
    SAEConfig("relu", d_sae=40, decoder="free", beta1=0.0, beta2=0.9999, lr=1e-3),
)
CONFIG = TrainConfig(
    tokens=4096, batch=128, chunk_batches=4, log_every=2, dead_window=600, histogram_every=3, watch=(0, 5)
)


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig("docs-2l"), torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]
    texts = [Document(f"d{i}", " ".join(rng.choice(words, 400))) for i in range(8)]
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = load_tokenizer(find_model("docs-2l").path)
    build_token_store(folder, "made", texts, tokenizer, context=32, blocks=64, progress=NullProgress())
    return TokenStore(folder)


def training(model, store, saes=SAES, sites=SITES, config=CONFIG):
    stream = Stream(store, 4, config.batch * config.chunk_batches, config.seed)
    return Training(model, stream, sites, saes, config)


def tensors(saes):
    return {f"{s.info.name}.{n}": t for s in saes for n, t in s.tensors().items()}


def lasting(tables):
    """The rows of the training tables without speeds."""
    return {
        name: [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
        for name, rows in tables.items()
    }


@pytest.fixture(scope="module")
def undisturbed(model, store, tmp_path_factory):
    run = training(model, store)
    return tensors(run.run(tmp_path_factory.mktemp("x") / "c", NullProgress())), lasting(run.tables())


@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_stopped_after_any_chunk_and_resumed_is_never_stopped(model, store, undisturbed, tmp_path, chunks):
    first = training(model, store)
    for _ in range(chunks):
        first.train_chunk()
    first.save(tmp_path / "checkpoint")
    second = training(model, store)
    found = tensors(second.run(tmp_path / "checkpoint", NullProgress()))
    assert found.keys() == undisturbed[0].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in undisturbed[0].items())
    assert lasting(second.tables()) == undisturbed[1]


@pytest.mark.parametrize("config", OTHERS, ids=lambda c: c.architecture)
def test_every_architecture_resumes_exactly_and_alone_is_the_same(model, store, tmp_path, config):
    short = replace(CONFIG, tokens=1536)
    whole = training(model, store, [config], config=short)
    expected = tensors(whole.run(tmp_path / "a", NullProgress()))
    first = training(model, store, [config], config=short)
    first.train_chunk()
    first.save(tmp_path / "checkpoint")
    second = training(model, store, [config], config=short)
    found = tensors(second.run(tmp_path / "checkpoint", NullProgress()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    alone = tensors(training(model, store, [config], SITES[1:2], short).run(tmp_path / "b", NullProgress()))
    assert alone
    for name, tensor in alone.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("config", [*SAES, *OTHERS], ids=lambda c: f"{c.architecture}-{c.decoder}")
def test_a_trained_sae_encodes_and_reconstructs_as_its_bank_did(model, store, tmp_path, config):
    """What is published (unscaled, as a file) gives the bank's own reconstruction of the same tokens."""
    run = training(model, store, [config], SITES[:1], replace(CONFIG, tokens=1024))
    (sae,) = run.run(tmp_path / "c", NullProgress())
    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert tensors([again]).keys() == tensors([sae]).keys()
    assert again.info == sae.info
    x = Harvest(model, run.stream, SITES[:1]).chunk(5).rows(SITES[0])
    (group,) = run.groups
    how = config.normalize_activations
    scaled = run._rows(Harvest(model, run.stream, SITES[:1]).chunk(5), SITES[0], how) * group.scale[0]
    p = {"b_dec": group.bank.b_dec, **group.bank.parameters()}
    out = group.bank.forward(slice(0, 1), p, scaled[None])
    x_hat = out.x_hat[0] / group.scale[0]
    if (undo := sae.scale(x)) is not None:
        x_hat = undo.undo(x_hat)
    found = again.reconstruct(x)
    if config.architecture in ("batchtopk", "matryoshka"):
        # In use a threshold stands for the batch's own cut: on average the same number of features.
        l0 = len(again.active(x).row) / len(x)
        assert 0.5 * config.k < l0 < 1.7 * config.k
        same = (found - x_hat).abs().amax(1) < 1e-3 * x.abs().max()
        assert same.float().mean() > 0.2
    else:
        torch.testing.assert_close(found, x_hat, atol=1e-3 * x.abs().max().item(), rtol=1e-3)


def test_sweeps_share_a_bank_and_shapes_do_not(model, store):
    sweep = [SAEConfig("relu", d_sae=32, l1_coefficient=c, label=str(c)) for c in (0.1, 1.0, 10.0)]
    wider = SAEConfig("relu", d_sae=64)
    run = training(model, store, [*sweep, wider], SITES[:2])
    assert [len(g.bank) for g in run.groups] == [6, 2]
    assert run.names == [
        f"docs-2l/{site.name}.relu-{sae.d_sae}{'-' + sae.label if sae.label else ''}"
        for sae in [*sweep, wider]
        for site in SITES[:2]
    ]


def test_resampling_gives_dead_features_another_chance(model, store, tmp_path):
    dying = SAEConfig("relu", d_sae=64, l1_coefficient=30.0, lr=1e-2, resample_tokens=1024)
    config = replace(CONFIG, tokens=8192, dead_window=300)
    logs = {}
    for kind in ("none", "resample"):
        run = training(model, store, [replace(dying, dead_features=kind)], SITES[:1], config)
        run.run(tmp_path / kind, NullProgress())
        logs[kind] = [row["dead_fraction"] for row in run.tables()["training_log"]]
    half = len(logs["none"]) // 2
    assert max(logs["none"][:half]) > 0.1
    assert min(logs["resample"][half : half + 8]) < min(logs["none"][half : half + 8])


# ---------------------------------------------------------------- objectives

Q = (Site("q", 1, 3), Site("k", 1, 3))


@pytest.mark.parametrize("kind", ["q", "k"])
def test_attention_losses_by_loops(kind):
    g = torch.Generator().manual_seed(3)
    x, x_hat, other = (torch.randn(1, 2, 5, 4, generator=g, dtype=torch.float64) for _ in range(3))
    squares, kls = [], []
    for b in range(2):
        for query in range(1, 5):
            pairs = []
            for version in (x, x_hat):
                q, k = (version, other) if kind == "q" else (other, version)
                pairs.append([float(q[0, b, query] @ k[0, b, s]) / 2 for s in range(query + 1)])
            delta = np.subtract(pairs[1], pairs[0])
            squares += list((delta - delta.mean()) ** 2)
            p, r = (np.exp(s) / np.exp(s).sum() for s in pairs)
            kls.append(float((p * np.log(p / r)).sum()))
    assert scores_loss(kind, x, x_hat, other).item() == pytest.approx(np.mean(squares), rel=1e-9)
    assert pattern_loss(kind, x, x_hat, other).item() == pytest.approx(np.mean(kls), rel=1e-9)


def test_kl_loss_is_the_models_and_reaches_the_reconstruction(model, store):
    tokens = torch.from_numpy(store.blocks(range(2)))
    site = SITES[1]
    x = Harvest(model, Stream(store, 4, 31, 0), [site]).blocks(np.arange(2)).activations[site]
    clean = model.bridge(tokens, return_type="logits")[:, :-1].double().log_softmax(-1)
    x_hat = (0.5 * x)[None].requires_grad_()
    loss = kl_loss(model, tokens, clean.float(), [site], x_hat)
    from atlas.lm.hooks import logits_with

    other = logits_with(model, tokens, {site: lambda value: 0.5 * value})[:, :-1].double().log_softmax(-1)
    assert loss.item() == pytest.approx((clean.exp() * (clean - other)).sum(-1).mean().item(), rel=1e-3)
    (gradient,) = torch.autograd.grad(loss.sum(), x_hat)
    step = 1e-2 * gradient / gradient.norm()
    higher = kl_loss(model, tokens, clean.float(), [site], x_hat.detach() + step)
    assert (higher - loss).item() == pytest.approx(1e-2 * gradient.norm().item(), rel=0.1)
    assert kl_loss(model, tokens, clean.float(), [site], x[None]).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("objective", ["scores", "pattern", "kl"])
def test_training_for_an_objective_improves_it(model, store, tmp_path, objective):
    """Beside a faint squared error, the objective falls further than without it, and resumes exactly."""
    base = SAEConfig("topk", d_sae=32, k=2, objective=objective, mse_coefficient=0.05, lr=5e-3)
    config = replace(CONFIG, tokens=4096, warmup=0.0)
    sites = Q if objective != "kl" else SITES[1:2]
    ends = {}
    for weight in (0.0, 30.0):
        sae = replace(base, objective_coefficient=weight)
        run = training(model, store, [sae], sites, config)
        run.run(tmp_path / f"{weight}", NullProgress())
        again = training(model, store, [replace(sae, objective_coefficient=1.0)], sites, config)
        for group, trained in zip(again.groups, run.groups, strict=True):
            group.restore(trained.state())
        again.chunk = 6
        again.train_chunk()
        rows = again.tables()["training_log"]
        ends[weight] = sum(row["objective_loss"] for row in rows[: len(sites)])
    assert ends[30.0] < 0.9 * ends[0.0]


def test_objectives_that_make_no_sense_are_refused(model, store):
    with pytest.raises(ConfigError, match=r"L00\.z is neither"):
        training(model, store, [SAEConfig(objective="pattern", k=4)], SITES[:1])
    with pytest.raises(ConfigError, match="batch 8 is below one; allowed with corpus context 32: 31"):
        training(model, store, [SAEConfig(objective="kl", k=4)], SITES[:1], replace(CONFIG, batch=8))
    assert partner(Site("k", 1, 2)) == Site("q", 1, 2)


def test_patterns_that_do_not_follow_from_q_and_k_are_refused(model, store, monkeypatch):
    monkeypatch.setattr(model.bridge.blocks[1].attn.config, "scale_attn_by_inverse_layer_idx", True)
    training(model, store, [SAEConfig(objective="scores", k=4)], [Site("q", 0, 3)])
    with pytest.raises(ConfigError, match=r"layer 1 of docs-2l has others; allowed: mse, kl"):
        training(model, store, [SAEConfig(objective="scores", k=4)], Q)


def test_tokens_of_whole_blocks_are_counted(model, store, tmp_path):
    """Four blocks of 31 tokens make a batch of about 128."""
    saes = [SAEConfig(d_sae=32, k=2), SAEConfig(d_sae=32, k=2, objective="kl", label="b")]
    run = training(model, store, saes, SITES[1:2], replace(CONFIG, tokens=512))
    plain, whole = run.run(tmp_path / "c", NullProgress())
    assert (plain.info.tokens_trained, whole.info.tokens_trained) == (512, 4 * 4 * 31)
    last = {row["sae"]: row["tokens"] for row in run.tables()["training_log"] if row["step"] == 4}
    assert list(last.values()) == [512, 4 * 4 * 31]


def test_members_that_run_the_model_do_so_one_at_a_time(model, store):
    """The logits of one pass are large; those of a whole bank would not fit."""
    run = training(model, store, [SAEConfig(d_sae=32, k=2, objective="kl")], SITES[:2])
    assert run.groups[0].bank.slices(128) == [slice(0, 1), slice(1, 2)]


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("revival", ["none", "resample"])
def test_a_loss_that_is_not_finite_stops_it_and_names_the_rate_to_change(model, store, tmp_path, revival):
    sae = SAEConfig("relu", d_sae=32, lr=1e12, dead_features=revival, resample_tokens=512)
    config = replace(CONFIG, log_every=1000, dead_window=128)
    with pytest.raises(SAEError, match=r"z\.relu-32' diverged by step \d+; try a smaller lr than 1e\+12"):
        training(model, store, [sae], SITES[:1], config).run(tmp_path / "c", NullProgress())


# ---------------------------------------------------------------- logs


def test_logged_tables_hold_what_happened(undisturbed):
    _, tables = undisturbed
    log, density, watched = (tables[n] for n in ("training_log", "training_density", "training_watched"))
    steps = 4096 // 128
    assert {row["step"] for row in log} == set(range(2, steps + 1, 2))
    for row in log:
        parts = ("mse_loss", "sparsity_loss", "aux_loss", "objective_loss")
        assert row["loss"] == pytest.approx(sum(row[p] for p in parts), rel=1e-5)
        assert row["tokens"] == row["step"] * 128
    assert {row["step"] for row in density} == {*range(6, steps + 1, 6), steps}
    widths = {"topk": 48, "relu": 32}
    for sae in {row["sae"] for row in density}:
        for step in (6, steps):
            total = sum(r["n"] for r in density if (r["sae"], r["step"]) == (sae, step))
            assert total == widths[sae.split(".")[-1].split("-")[0]]
    assert {row["feature"] for row in watched} == {0, 5}
    assert any(row["max_activation"] > 0 for row in watched)


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_watched_activations_are_those_of_the_finished_sae(model, store, tmp_path, decoder):
    sae = SAEConfig("relu", d_sae=32, decoder=decoder)
    config = replace(CONFIG, tokens=2048, watch=tuple(range(32)), decay=1.0)
    run = training(model, store, [sae], SITES[:1], config)
    (group,) = run.groups
    (first,) = run.run(tmp_path / "c", NullProgress())
    if decoder == "free":
        assert (group.bank.W_dec.norm(dim=2) - 1).abs().max() > 0.05
    last = {r["feature"]: r["max_activation"] for r in run.tables()["training_watched"] if r["step"] == 16}
    order = torch.from_numpy(run.stream.token_order(3))[-128:]
    acts = first.encode(Harvest(model, run.stream, SITES[:1]).chunk(3).rows(SITES[0])[order])
    peaks = acts.amax(0)
    strong = peaks > 0.3 * peaks.max()
    found = torch.tensor([last[f] for f in range(32)])
    torch.testing.assert_close(found[strong], peaks[strong], rtol=0.02, atol=0)


def test_live_rows_are_the_tables(model, store, tmp_path):
    run = training(model, store, SAES[:2], SITES[:1], replace(CONFIG, tokens=1024))
    run.run(tmp_path / "c", NullProgress(), live=tmp_path / "live.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "live.jsonl").read_text().splitlines()]
    for name, rows in run.tables().items():
        mine = [{k: v for k, v in line.items() if k != "table"} for line in lines if line["table"] == name]
        key = sorted(mine, key=str)
        assert key == sorted(rows, key=str)


def test_a_member_of_a_bank_is_the_sae_trained_alone(model, store, undisturbed, tmp_path):
    alone = training(model, store, SAES[:1], SITES[1:2]).run(tmp_path / "c", NullProgress())
    for name, tensor in tensors(alone).items():
        assert torch.equal(tensor, undisturbed[0][name]), name


@pytest.mark.parametrize("damage", ["garbage", "cut", "no state", "no chunk", "wrong shape", "other run"])
def test_a_damaged_checkpoint_is_refused(model, store, tmp_path, damage):
    run, path = training(model, store), tmp_path / "checkpoint"
    run.train_chunk()
    run.save(path)
    if damage == "garbage":
        path.write_bytes(b"\xff" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "other run":
        training(model, store, SAES[:1], SITES[:1]).save(path)
    else:
        kept = load_file(path)
        state = None if damage == "no state" else {"state": "{}"}
        if damage == "wrong shape":
            kept["0.scale"], kept["0.W_enc"] = kept["0.scale"], torch.zeros(1, 2, 3)
            state = {"state": '{"chunk": 1, "logs": [[], [], [], []]}'}
        save_file(kept, path, metadata=state)
    with pytest.raises(SAEError, match="cannot be read"):
        training(model, store).run(path, NullProgress())


def test_the_loss_falls_and_decoders_keep_norm_one(undisturbed):
    found, log = undisturbed[0], undisturbed[1]["training_log"]
    for name in {row["sae"] for row in log if not row["sae"].endswith("-b")}:
        explained = [row["variance_explained"] for row in log if row["sae"] == name]
        assert explained[-1] > explained[0]
        assert torch.allclose(found[f"{name}.W_dec"].norm(dim=1), torch.ones(()), atol=1e-5)


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(TrainConfig(warmup=0.2, decay=0.5), s, 50) for s in range(50)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(rates) == 1.0
    assert rates[-25:] == pytest.approx([(50 - s) / 25 for s in range(25, 50)])


def test_each_time_through_the_text_is_a_permutation(store):
    stream = Stream(store, 4, 31 * 6, 3)
    n, size = stream.n_train, stream.chunk_blocks
    numbers = np.concatenate([stream.block_numbers(c) for c in range(2 * n // size + 1)])
    assert sorted(numbers[:n]) == list(range(4, len(store)))
    assert sorted(numbers[n : 2 * n]) == list(range(4, len(store)))
    assert list(numbers[:n]) != list(numbers[n : 2 * n])


def test_a_chunk_holds_the_tokens_of_its_blocks_without_position_0(model, store):
    stream = Stream(store, 4, 31 * 3, 0)
    site = Site("resid_pre", 0)
    rows = Harvest(model, stream, [site]).chunk(0).rows(site)
    ids = torch.from_numpy(store.blocks(stream.block_numbers(0)))
    embedded = model.bridge.run_with_cache(ids, names_filter=[site.hook_name])[1][site.hook_name]
    assert torch.allclose(rows, embedded[:, 1:].reshape(-1, embedded.shape[-1]))
    order = stream.token_order(0)
    assert len(order) == 31 * 3
    assert len(set(order)) == len(order)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_activations_are_rounded_as_asked(model, store, dtype):
    plain, coarse = (
        Harvest(model, Stream(store, 4, 31, 0, d), SITES[:1]).chunk(0).rows(SITES[0])
        for d in ("float32", dtype)
    )
    assert torch.equal(coarse, plain.to(getattr(torch, dtype)).float())
    assert not torch.equal(coarse, plain)


def test_what_does_not_fit_into_float16_is_refused():
    with pytest.raises(SAEError, match="70000 does not fit into float16"):
        rounded(torch.tensor([1.0, 70000.0]), "float16")


def test_nothing_left_to_train_on(model, store):
    with pytest.raises(CorpusError, match="none is left"):
        Stream(store, len(store), 128, 0).block_numbers(0)


def test_a_site_that_is_zero_is_refused(model, store, tmp_path):
    """docs-2l is attention-only: its MLPs write nothing."""
    run = training(model, store, [SAES[0]], [Site("mlp_out", 1)])
    with pytest.raises(SAEError, match=r"L01\.mlp_out is zero on all of the first \d+ tokens"):
        run.run(tmp_path / "state", NullProgress())
