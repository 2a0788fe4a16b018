"""The training loop: schedule, exact resume after any chunk, damaged checkpoints, members alone."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas.configs import ModelConfig, SAEConfig, TrainConfig
from atlas.corpus.sources import Document
from atlas.corpus.tokens import TokenStore, build_token_store, load_tokenizer
from atlas.errors import CorpusError, SAEError
from atlas.lm.files import find_model
from atlas.lm.load import load_model
from atlas.progress import NullProgress
from atlas.sae.harvest import Stream, harvest_chunk
from atlas.sae.train import Training, learning_rate
from atlas.sites import Site

SITES = (Site("z", 0), Site("z", 1), Site("q", 1, 3))
SAES = (SAEConfig("topk", d_sae=48, k=6, aux_k=4), SAEConfig("relu", d_sae=32, l1_coefficient=1.0))
CONFIG = TrainConfig(tokens=4096, batch=128, chunk_batches=4, log_every=2, dead_window=600)


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
    return {f"{s.info.name}.{n}": getattr(s, n) for s in saes for n in ("W_enc", "b_enc", "W_dec", "b_dec")}


@pytest.fixture(scope="module")
def undisturbed(model, store, tmp_path_factory):
    run = training(model, store)
    return tensors(run.run(tmp_path_factory.mktemp("x") / "c", NullProgress())), run.log_rows()


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
    assert second.log_rows() == undisturbed[1]


def test_a_member_of_a_bank_is_the_sae_trained_alone(model, store, undisturbed, tmp_path):
    alone = training(model, store, SAES[:1], SITES[1:2]).run(tmp_path / "c", NullProgress())
    for name, tensor in tensors(alone).items():
        assert torch.allclose(tensor, undisturbed[0][name], atol=2e-4), name


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
    found, log = undisturbed
    for name in {row["sae"] for row in log}:
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
    rows = harvest_chunk(model, stream, [site], 0)[site]
    ids = torch.from_numpy(store.blocks(stream.block_numbers(0)))
    embedded = model.bridge.run_with_cache(ids, names_filter=[site.hook_name])[1][site.hook_name]
    expected = embedded[:, 1:].reshape(-1, embedded.shape[-1])[torch.from_numpy(stream.token_order(0))]
    assert torch.allclose(rows, expected)


def test_nothing_left_to_train_on(model, store):
    with pytest.raises(CorpusError, match="none is left"):
        Stream(store, len(store), 128, 0).block_numbers(0)
