"""The activation cache: the same bits as the model's, whatever is missing, damaged, full or killed."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.configs import SAEConfig, TrainConfig
from atlas.corpus.tokens import TokenStore
from atlas.errors import Cancelled, SAEError, StoreError
from atlas.lm.hooks import capture
from atlas.progress import NullProgress
from atlas.sae import cache as cache_module
from atlas.sae import cache_files, cache_folder, harvest
from atlas.sae.cache import CachedHarvest, fill, identity
from atlas.sae.harvest import BATCH_BLOCKS, Harvest, Source, Stream, rounded
from atlas.sae.train import Training
from atlas.sites import Site

from .tiny import random_tokens, save_store, tiny_model

SITES = tuple(Site.parse(name) for name in ("L00.z", "L01.z", "L00.H01.q", "L01.H02.k", "L01.resid_pre"))
BLOCKS = 70
LARGE = 10**9


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(save_store(tmp_path_factory.mktemp("tokens"), random_tokens(BLOCKS)))


def stream_of(store, dtype="float32", seed=0):
    return Stream(store, held_out=4, chunk_tokens=180, seed=seed, dtype=dtype)


def cached(store, folder, sites=SITES, limit=LARGE, dtype="float32", seed=0):
    return CachedHarvest(tiny_model(), stream_of(store, dtype, seed), sites, folder, limit)


def same(a, b):
    assert torch.equal(a.tokens, b.tokens)
    assert list(a.activations) == list(b.activations)
    for site, x in a.activations.items():
        assert x.dtype == b.activations[site].dtype == torch.float32
        assert torch.equal(x, b.activations[site]), site.name


def shards(root):
    return sorted(Path(root).glob("*/*.acts"))


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(harvest, "read_sites", refuse)


def numbers_of(rng, n):
    return rng.integers(0, BLOCKS, n)


@pytest.mark.parametrize("model_name", ["tiny", "docs-2l"])
def test_the_bits_of_a_block_do_not_depend_on_its_companions(store, model_name):
    """What the cache rests on: a full batch gives a row the same bits at any place among any others."""
    from atlas.configs import ModelConfig
    from atlas.lm.load import load_model

    model = tiny_model() if model_name == "tiny" else load_model(ModelConfig(model_name), torch.device("cpu"))
    sites = [Site.parse(n) for n in ("L00.z", "L01.z", "L01.H01.q", "L01.attn_out", "L01.mlp_out")]
    tokens = torch.from_numpy(store.blocks(np.arange(BLOCKS)))
    rng, seen = np.random.default_rng(0), {}
    for _ in range(12):
        numbers = rng.permutation(BLOCKS)[:BATCH_BLOCKS]
        values, _ = capture(model, tokens[numbers], sites)
        for i, block in enumerate(numbers.tolist()):
            for site, x in values.items():
                assert torch.equal(seen.setdefault((block, site), x[i].clone()), x[i]), (block, site.name)
    assert len(seen) > 60 * len(sites)


@pytest.mark.parametrize("later", [(), (60, 61, 3, 62)])
def test_a_harvest_reads_every_block_of_a_random_order(store, later):
    source = Harvest(tiny_model(), stream_of(store), SITES)
    numbers = np.array([5, 3, 3, 60, 9, *range(20, 50), 5])
    chunk = source.blocks(numbers, later)
    again = source.blocks(np.array([62, 61, 5]))
    for found, blocks in ((chunk, numbers), (again, [62, 61, 5])):
        for site, x in found.activations.items():
            for i, block in enumerate(blocks):
                tokens = torch.from_numpy(store.blocks([block]))
                alone, _ = capture(tiny_model(), tokens, [site])
                torch.testing.assert_close(x[i], alone[site][0], rtol=1e-5, atol=1e-5)


def test_spare_places_of_a_batch_are_blocks_of_the_next_chunk(store, monkeypatch):
    passes = []
    monkeypatch.setattr(harvest, "read_sites", lambda m, t, s: passes.append(t) or capture(m, t, s)[0])
    stream = stream_of(store)
    assert stream.chunk_blocks == 20
    source = Harvest(tiny_model(), stream, SITES)
    for number in range(4):
        source.chunk(number)
    assert [len(t) for t in passes] == [BATCH_BLOCKS] * 5, "80 blocks are 5 full batches"


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    chosen=st.lists(st.sets(st.integers(0, len(SITES) - 1), min_size=1), min_size=2, max_size=4),
    limit=st.sampled_from([LARGE, 60_000, 0]),
)
def test_any_orders_sites_and_dtypes_equal_the_stream(store, tmp_path_factory, seed, dtype, chosen, limit):
    rng, root = np.random.default_rng(seed), tmp_path_factory.mktemp("cache")
    for which in chosen:
        sites = [SITES[i] for i in rng.permutation(sorted(which))]
        source = cached(store, root, sites, limit, dtype)
        assert isinstance(source, Source)
        plain = Harvest(tiny_model(), stream_of(store, dtype), sites)
        for _ in range(3):
            numbers, later = numbers_of(rng, rng.integers(1, 40)), numbers_of(rng, rng.integers(0, 9))
            same(source.blocks(numbers, later), plain.blocks(numbers))
        assert sum(path.stat().st_size for path in shards(root)) <= limit


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_second_run_never_runs_the_model_and_files_hold_rounded_values(store, tmp_path, dtype, request):
    first = cached(store, tmp_path, dtype=dtype)
    chunks = [first.chunk(number) for number in range(4)]
    for other_seed in (0, 5):
        cached(store, tmp_path, dtype=dtype, seed=other_seed)
    request.getfixturevalue("no_model")
    second = cached(store, tmp_path, dtype=dtype)
    for number, chunk in enumerate(chunks):
        same(second.chunk(number), chunk)
    same(
        cached(store, tmp_path, dtype=dtype, seed=5).chunk(2),
        cached(store, tmp_path, dtype=dtype, seed=5).chunk(2),
    )
    assert second.forward_blocks == 0
    for x in chunks[0].activations.values():
        assert torch.equal(rounded(x, dtype), x)
    n, width = 66, sum(site.d_in(tiny_model().shape) for site in SITES)
    bare = n * 10 * width * getattr(torch, dtype).itemsize
    assert bare < sum(p.stat().st_size for p in shards(tmp_path)) < bare + n * len(SITES) * 32 + 4 * 1000


def test_only_missing_sites_are_made_and_written(store, tmp_path):
    numbers = np.arange(10, 30)
    cached(store, tmp_path, SITES[:2]).blocks(numbers)
    second = cached(store, tmp_path)
    same(
        second.blocks(np.arange(5, 30)),
        Harvest(tiny_model(), stream_of(store), SITES).blocks(np.arange(5, 30)),
    )
    written = [set(shard.sites) for shard in opened(tmp_path)]
    assert sorted(map(len, written)) == [2, 3, 5]
    assert cached(store, tmp_path).missing(np.arange(5, 30)) == []


def opened(root, dtype="float32"):
    shape = tiny_model().shape
    return [cache_files.Shard(path, lambda s: s.d_in(shape), 10, dtype) for path in shards(root)]


def test_training_from_the_cache_and_from_the_stream_is_the_same(store, tmp_path):
    config = TrainConfig(tokens=1440, batch=45, chunk_batches=4, activation_dtype="bfloat16")
    saes = [SAEConfig(d_sae=24, k=4, aux_k=4), SAEConfig(architecture="relu", d_sae=24)]
    stream = stream_of(store, "bfloat16")
    plain = None
    for run, source in enumerate(
        (None, *(cached(store, tmp_path, SITES[:2], dtype="bfloat16") for _ in "ab"))
    ):
        training = Training(tiny_model(), stream, SITES[:2], saes, config, source)
        found = training.run(tmp_path / f"checkpoint-{run}", NullProgress())
        tensors = [t for sae in found for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
        plain = plain or tensors
        assert all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "magic": lambda p: flip(p, 3),
    "length": lambda p: flip(p, 15),
    "header digest": lambda p: flip(p, 20),
    "header": lambda p: flip(p, 60),
    "piece": lambda p: flip(p, -5),
    "digests": lambda p: flip(p, p.stat().st_size - 20 * 10 * 4 * (12 * 3 + 4 * 2) - 7),
    "truncated": lambda p: os.truncate(p, p.stat().st_size - 1),
    "only a start": lambda p: os.truncate(p, 10),
    "empty": lambda p: os.truncate(p, 0),
    "longer": lambda p: os.truncate(p, p.stat().st_size + 1),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_dropped_and_made_anew(store, tmp_path, damage, when, caplog):
    numbers = np.arange(10, 30)
    expected = cached(store, tmp_path).blocks(numbers)
    (path,) = shards(tmp_path)
    good = path.read_bytes()
    if when == "before":
        damage(path)
        reader = cached(store, tmp_path)
    else:
        reader = cached(store, tmp_path)
        damage(path)
    same(reader.blocks(numbers), expected)
    if path.read_bytes() != good:
        assert when == "after", "a header or size that changes after opening is not looked at again"
        return
    assert reader.forward_blocks == 20
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert path.name in caplog.text
    again = cached(store, tmp_path)
    same(again.blocks(numbers), expected)
    assert again.forward_blocks == 0


def test_damage_at_a_site_that_is_not_read_does_no_harm_yet(store, tmp_path):
    numbers = np.arange(10, 30)
    expected = cached(store, tmp_path).blocks(numbers)
    (path,) = shards(tmp_path)
    flip(path, -5)  # the last site
    reader = cached(store, tmp_path, SITES[:4])
    found = reader.blocks(numbers)
    assert reader.forward_blocks == 0
    assert all(torch.equal(found.activations[s], expected.activations[s]) for s in SITES[:4])


def test_a_shard_that_vanishes_comes_from_the_model(store, tmp_path):
    numbers = np.arange(10, 30)
    expected = cached(store, tmp_path).blocks(numbers)
    reader = cached(store, tmp_path)
    shards(tmp_path)[0].unlink()
    same(reader.blocks(numbers), expected)
    assert reader.forward_blocks == 20


def test_the_cache_stops_at_its_bound(store, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole = cached(store, tmp_path / "whole")
    whole.chunk(0)
    one = shards(tmp_path / "whole")[0].stat().st_size
    bounded = cached(store, tmp_path / "bounded", limit=2 * one + 10)
    plain = Harvest(tiny_model(), stream_of(store), SITES)
    for number in range(4):
        same(bounded.chunk(number), plain.chunk(number))
        assert sum(p.stat().st_size for p in shards(tmp_path / "bounded")) <= 2 * one + 10
    assert len(shards(tmp_path / "bounded")) == 2
    assert not bounded.growing
    assert caplog.text.count("bound") == 1
    assert not list((tmp_path / "bounded").glob("*/.work-*"))


def test_old_caches_that_nobody_uses_make_room(store, tmp_path):
    """Of three caches the oldest is in use, so the next older goes; the youngest stays."""
    folders, held = [], cached(store, tmp_path)
    for age, dtype in ((300, "float32"), (200, "float16"), (100, "bfloat16")):
        source = cached(store, tmp_path, dtype=dtype)
        source.chunk(0)
        folders.append(source.folder)
        del source
        os.utime(folders[-1] / "about.json", (time.time() - age,) * 2)
    total = sum(p.stat().st_size for p in shards(tmp_path))
    new = CachedHarvest(tiny_model("folded"), stream_of(store), SITES[:1], tmp_path, total)
    new.blocks(np.arange(30, 34))
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert len(shards(tmp_path)) == 3
    assert held.missing(stream_of(store).block_numbers(0)) == []


def test_a_shard_that_can_never_fit_evicts_nothing(store, tmp_path):
    cached(store, tmp_path, dtype="float16").chunk(0)
    source = cached(store, tmp_path, limit=1000)
    source.chunk(0)
    assert not source.growing
    assert len(shards(tmp_path)) == 1


def test_a_cache_is_named_by_what_decides_its_values(store, tmp_path):
    other = TokenStore(save_store(tmp_path / "other", random_tokens(BLOCKS, seed=1)))
    copy = TokenStore(save_store(tmp_path / "copy", random_tokens(BLOCKS)))
    base = identity(tiny_model(), stream_of(store))
    assert identity(tiny_model(), stream_of(copy, seed=9)) == base
    for model, stream in (
        (tiny_model(), stream_of(other)),
        (tiny_model("folded"), stream_of(store)),
        (tiny_model(), stream_of(store, "float16")),
        (replace(tiny_model(), files=tiny_model().files._replace(digest="x")), stream_of(store)),
    ):
        assert identity(model, stream) != base


def test_an_activation_that_float16_cannot_hold_is_refused(store, tmp_path, monkeypatch):
    def loud(model, tokens, sites):
        values, _ = capture(model, tokens, sites)
        return {site: x * 1e6 for site, x in values.items()}

    monkeypatch.setattr(harvest, "read_sites", loud)
    with pytest.raises(SAEError, match=r"does not fit into float16; use bfloat16"):
        cached(store, tmp_path, dtype="float16").chunk(0)
    assert not shards(tmp_path)
    cached(store, tmp_path, dtype="bfloat16").chunk(0)
    assert len(shards(tmp_path)) == 1


def test_a_full_disk_stops_the_cache_and_not_the_training(store, tmp_path, monkeypatch, caplog):
    calls = itertools.count()

    def full(fd, data, at):
        if next(calls) > 2:
            raise OSError(28, "No space left on device")
        return os.pwrite(fd, data[:1000], at)

    monkeypatch.setattr(cache_files, "os", type("os", (), {**vars(os), "pwrite": staticmethod(full)}))
    source, plain = cached(store, tmp_path), Harvest(tiny_model(), stream_of(store), SITES)
    for number in range(3):
        same(source.chunk(number), plain.chunk(number))
    assert [r.getMessage() for r in caplog.records] == [
        "activation cache stops growing: No space left on device; the work goes on without it"
    ]
    assert not list(tmp_path.glob("*/.work-*"))
    assert not shards(tmp_path)


def test_a_writer_that_is_refused_the_lock_stops_growing(store, tmp_path, monkeypatch, caplog):
    from atlas.store.atomic import lock

    monkeypatch.setattr(cache_folder, "PATIENCE", 0.05)
    source = cached(store, tmp_path)
    with lock(tmp_path / ".lock"):
        same(source.chunk(0), Harvest(tiny_model(), stream_of(store), SITES).chunk(0))
    assert "locked" in caplog.text
    assert not source.growing


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write") as caught:
        cached(store, tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_fill_ahead(store, tmp_path, request):
    source, seen = cached(store, tmp_path), []
    source.blocks(np.arange(10, 15))

    class Watch:
        def update(self, done, total, message=""):
            seen.append((done, total))

    assert fill(source, np.arange(4, BLOCKS), Watch()) == 66
    assert seen == [(5, 66), (66, 66)]
    request.getfixturevalue("no_model")
    assert fill(cached(store, tmp_path), range(4, BLOCKS), NullProgress()) == 66
    cached(store, tmp_path, seed=3).chunk(1)


def test_fill_stops_at_the_bound_and_when_told(store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FILL_BLOCKS", BATCH_BLOCKS)
    one = 60_000

    class Stop:
        def update(self, done, total, message=""):
            if done >= BATCH_BLOCKS:
                raise Cancelled("stop")

    with pytest.raises(Cancelled):
        fill(cached(store, tmp_path / "told"), range(4, BLOCKS), Stop())
    assert len(cached(store, tmp_path / "told").missing(range(4, BLOCKS))) == 66 - BATCH_BLOCKS
    source = cached(store, tmp_path / "bound", limit=one)
    filled = fill(source, range(4, BLOCKS), NullProgress())
    assert filled == BATCH_BLOCKS
    assert sum(p.stat().st_size for p in shards(tmp_path / "bound")) <= one


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from atlas.corpus.tokens import TokenStore
from atlas.sae import cache_files
from tests.test_sae_cache import cached
tokens, root, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
if pause:
    usual = cache_files._write
    def slow(fd, data, at):
        usual(fd, data, at)
        print("writing", flush=True)
        time.sleep(pause)
    cache_files._write = slow
source = cached(TokenStore(tokens), root)
for number in range(4):
    source.chunk(number)
    print("chunk", number, flush=True)
"""


def writer(store_folder, root, pause=0.0):
    command = [sys.executable, "-c", WRITER, str(store_folder), str(root), str(pause)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = Path(__file__).resolve().parent.parent
    return subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, text=True)


def test_another_process_reads_while_one_writes(store, tmp_path):
    tokens = save_store(tmp_path / "tokens", random_tokens(BLOCKS))
    process = writer(tokens, tmp_path / "cache")
    plain = Harvest(tiny_model(), stream_of(store), SITES)
    reader = cached(store, tmp_path / "cache")
    try:
        for number in range(4):
            assert process.stdout.readline() == f"chunk {number}\n"
            same(reader.chunk(number), plain.chunk(number))
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
    assert reader.forward_blocks == 0


@pytest.mark.slow
def test_two_writers_at_once_do_no_harm(store, tmp_path):
    tokens = save_store(tmp_path / "tokens", random_tokens(BLOCKS))
    processes = [writer(tokens, tmp_path / "cache", pause) for pause in (0.0, 0.01)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    reader = cached(store, tmp_path / "cache")
    plain = Harvest(tiny_model(), stream_of(store), SITES)
    for number in range(4):
        same(reader.chunk(number), plain.chunk(number))
    assert reader.forward_blocks == 0
    assert not list((tmp_path / "cache").glob("*/.work-*"))


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_that_is_read_or_stays(store, tmp_path):
    tokens = save_store(tmp_path / "tokens", random_tokens(BLOCKS))
    process = writer(tokens, tmp_path / "cache", pause=3600.0)
    assert process.stdout.readline() == "writing\n"
    (left,) = (tmp_path / "cache").glob("*/.work-*")
    living = cached(store, tmp_path / "cache")
    living.chunk(3)
    assert left.exists(), "its writer lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    plain = Harvest(tiny_model(), stream_of(store), SITES)
    for number in range(4):
        same(living.chunk(number), plain.chunk(number))
    assert not left.exists()
    again = cached(store, tmp_path / "cache")
    for number in range(4):
        same(again.chunk(number), plain.chunk(number))
    assert again.forward_blocks == 0
