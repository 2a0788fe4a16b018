"""Finetuning: frozen encoders, gradients against autograd, less suppression, exact resume."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas.configs import FinetuneConfig, TrainConfig
from atlas.corpus.tokens import TokenStore
from atlas.errors import SAEError
from atlas.progress import NullProgress
from atlas.sae.files import load_sae, save_sae
from atlas.sae.finetune import Decoder, Finetuning, frozen
from atlas.sae.harvest import Chunk, Harvest, Stream
from atlas.sae.metrics import ReconstructionSums
from atlas.sae.model import SAE
from atlas.sae.normalise import normalise
from atlas.sites import Site

from .test_sae_prune import ALL
from .tiny import D_MODEL, random_sae, random_tokens, save_store, tiny_model

TRAIN = TrainConfig(batch=64, chunk_batches=4, checkpoint_seconds=0)
SITE = Site("z", 1)


def data(n, seed=0, size=3.0):
    return size * torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("sae", ALL, ids=lambda s: f"{s.info.architecture}-{s.info.seed}")
def test_a_frozen_encoder_gives_the_same_bits(sae):
    x = data(500)
    again = frozen(sae)
    for mine, old in zip(again.active(x), sae.active(x), strict=True):
        assert torch.equal(mine, old)
    moved = again.with_tensors({"W_dec": again.W_dec * 3, "b_dec": again.b_dec + 7})
    for mine, old in zip(moved.active(x), sae.active(x), strict=True):
        assert torch.equal(mine, old)
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x))


@pytest.mark.parametrize("architecture", ["topk", "gated", "jumprelu"])
def test_a_gain_by_the_decoders_norm_is_frozen_too(architecture):
    sae = random_sae(architecture=architecture, k=4, rescale_acts_by_decoder_norm=True)
    x = torch.randn(200, sae.d_in, generator=torch.Generator().manual_seed(3))
    again = frozen(sae)
    assert not again.info.rescale_acts_by_decoder_norm
    torch.testing.assert_close(again.encode(x), sae.encode(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sae", ALL, ids=lambda s: f"{s.info.architecture}-{s.info.seed}")
def test_gradients_against_autograd_on_dense_matrices(sae):
    x, decoder = data(80), Decoder(sae, 1e-3)
    decoder.start(x)
    with torch.no_grad():
        decoder.gain.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    found = decoder.gradients(x)
    rows, gain, bias = (p.detach().double().requires_grad_() for p in decoder.parameters().values())
    f = sae.encode(x).double() * decoder.scale.double()
    target = normalise(x, sae.scale(x)).double() * decoder.scale.double()
    loss = ((f * gain) @ rows + bias - target).square().sum(1).mean()
    loss.backward()
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for p, exact in zip(decoder.parameters().values(), (rows, gain, bias), strict=True):
        scale = exact.grad.abs().max().item()
        torch.testing.assert_close(p.grad.double(), exact.grad, atol=1e-5 * scale, rtol=1e-4)


# ---------------------------------------------------------------- feature suppression


class Synthetic:
    """Chunks of sparse combinations of a known dictionary in place of a model's activations."""

    def __init__(self, stream, d_in=D_MODEL, n=16, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.stream = stream
        self.dictionary = torch.nn.functional.normalize(torch.randn(n, d_in, generator=g), dim=1)

    def chunk(self, number):
        blocks, pos = self.stream.chunk_blocks, self.stream.store.meta.context
        g = torch.Generator().manual_seed(1000 + number)
        on = torch.rand(blocks, pos, len(self.dictionary), generator=g) < 0.15
        size = 1 + torch.rand(on.shape, generator=g)
        return Chunk(torch.zeros(blocks, pos, dtype=torch.int64), {SITE: (on * size) @ self.dictionary + 0.3})


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "store"
    tokens = random_tokens(70, 10, seed=2)
    return Stream(TokenStore(save_store(folder, tokens)), 2, TRAIN.batch * TRAIN.chunk_batches, 5)


def suppressed(source, steps=60):
    """A ReLU SAE trained with a strong L1 penalty on unit-norm rows."""
    sae = random_sae(SITE.name, d_sae=32)
    p = {name: t.clone().requires_grad_() for name, t in sae.tensors().items()}
    optimiser = torch.optim.Adam(p.values(), lr=2e-2)
    for step in range(steps):
        x = source.chunk(step).rows(SITE)
        rows = torch.nn.functional.normalize(p["W_dec"], dim=1)
        f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
        loss = (f @ rows + p["b_dec"] - x).square().sum(1).mean() + 0.8 * f.sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    p["W_dec"] = torch.nn.functional.normalize(p["W_dec"], dim=1)
    return SAE(sae.info, **{name: t.detach() for name, t in p.items()})


def quality(sae, source, numbers=range(500, 504)):
    sums = ReconstructionSums(sae.d_in, sae.d_sae)
    for number in numbers:
        x = source.chunk(number).rows(SITE)
        sums.update(x, sae.reconstruct(x), sae.active(x).feature)
    return sums.metrics()


@pytest.mark.parametrize("normalised", ["none", "layer_norm"])
def test_finetuning_undoes_suppression_and_leaves_activations_alone(stream, tmp_path, normalised):
    source = Synthetic(stream)
    sae = suppressed(source)
    sae = replace(sae, info=replace(sae.info, normalize_activations=normalised))
    before = quality(sae, source)
    run = Finetuning(source, stream, [sae], FinetuneConfig(tokens=40_000, lr=2e-2), TRAIN)
    (tuned,) = run.run(tmp_path / "c", NullProgress())
    after = quality(tuned, source)
    assert after["mse"] < 0.8 * before["mse"]
    assert after["variance_explained"] > before["variance_explained"]
    if normalised == "none":
        assert before["l2_ratio"] < 0.9
        assert before["l2_ratio"] + 0.05 < after["l2_ratio"] < 1.02
        norms = tuned.W_dec.norm(dim=1)
        assert norms[norms != 1].max() > 1.05
    assert after["l0"] == before["l0"]
    save_sae(tuned, tmp_path / "sae")
    x = source.chunk(600).rows(SITE)
    for mine, old in zip(load_sae(tmp_path / "sae").active(x), sae.active(x), strict=True):
        assert torch.equal(mine, old)


def test_an_sae_without_a_decoder_bias_gets_none(stream, tmp_path):
    source = Synthetic(stream)
    sae = suppressed(source, 5).with_tensors({"b_dec": torch.zeros(D_MODEL)})
    run = Finetuning(source, stream, [sae], FinetuneConfig(tokens=1000, lr=1e-2), TRAIN)
    (tuned,) = run.run(tmp_path / "c", NullProgress())
    assert not tuned.b_dec.any()
    assert not torch.equal(tuned.W_dec, sae.W_dec)


# ---------------------------------------------------------------- several SAEs, stopped and resumed

SAES = [
    random_sae("L00.z", k=4, d_sae=24, seed=1),
    random_sae("L01.z", d_sae=16, seed=2),
    replace(random_sae("L01.H01.q", d_in=4, k=2, d_sae=8, seed=3)),
]


def finetuning(stream, saes=SAES):
    source = Harvest(tiny_model(), stream, [sae.info.site for sae in saes])
    return Finetuning(source, stream, saes, FinetuneConfig(tokens=1500, lr=1e-2), TRAIN)


@pytest.fixture(scope="module")
def undisturbed(stream, tmp_path_factory):
    return finetuning(stream).run(tmp_path_factory.mktemp("x") / "c", NullProgress())


@pytest.mark.parametrize("chunks", [1, 3, 5])
def test_stopped_after_any_chunk_and_resumed_is_never_stopped(stream, undisturbed, tmp_path, chunks):
    first = finetuning(stream)
    for _ in range(chunks):
        first.train_chunk()
    first.save(tmp_path / "checkpoint")
    second = finetuning(stream)
    found = second.run(tmp_path / "checkpoint", NullProgress())
    assert second.n_chunks == 6
    assert [sae.digest() for sae in found] == [sae.digest() for sae in undisturbed]
    assert [sae.info for sae in found] == [sae.info for sae in undisturbed]


def test_company_does_not_matter(stream, undisturbed, tmp_path):
    for sae, expected in zip(SAES, undisturbed, strict=True):
        (alone,) = finetuning(stream, [sae]).run(tmp_path / sae.info.site.name, NullProgress())
        assert alone.digest() == expected.digest()
        assert alone.digest() != sae.digest()


@pytest.mark.parametrize("damage", ["garbage", "cut", "no state", "wrong shape", "other run"])
def test_a_damaged_checkpoint_is_refused(stream, tmp_path, damage):
    run, path = finetuning(stream), tmp_path / "checkpoint"
    run.train_chunk()
    run.save(path)
    if damage == "garbage":
        path.write_bytes(b"\xff" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other run":
        other = finetuning(stream, SAES[1:])
        other.train_chunk()
        other.save(path)
    else:
        kept = load_file(path)
        state = None if damage == "no state" else {"state": '{"chunk": 1, "first": [1.0, 1.0, 1.0]}'}
        save_file(kept | {"0.rows": torch.zeros(2, 3)}, path, metadata=state)
    with pytest.raises(SAEError, match="cannot be read"):
        finetuning(stream).run(path, NullProgress())


def test_a_loss_that_is_not_finite_stops_it(stream, tmp_path):
    huge = random_sae("L01.z", scale=1e18)
    with pytest.raises(SAEError, match=r"diverged at step 1; try a smaller lr than 0\.01"):
        finetuning(stream, [huge]).run(tmp_path / "c", NullProgress())
