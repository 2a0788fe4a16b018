"""The residual stream kept for DFA: the same rows with it and without, and nothing of it left behind."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis import dfa, shard
from atlas.analysis.dfa import DFAPass, Kept
from atlas.analysis.examples import TOP
from atlas.analysis.residuals import KeptResiduals
from atlas.analysis.second_look import batches
from atlas.analysis.shard import ShardPass
from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.hooks import capture
from atlas.progress import NullProgress
from atlas.sae.cache_folder import held_bytes, unused
from atlas.sites import Site

from .tiny import D_HEAD, D_MODEL, random_sae, random_tokens, save_store, tiny_model

BLOCKS, CONTEXT, BATCH, LARGE = 11, 10, 4, 10**9
TOKENS = random_tokens(BLOCKS, CONTEXT)
BATCH_BYTES = 2 * BATCH * CONTEXT * D_MODEL * 4
"""Of two layers, without headers and digests."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(save_store(tmp_path_factory.mktemp("residuals") / "store", TOKENS))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(dfa, "BATCH_BLOCKS", BATCH)
    monkeypatch.setattr(shard, "BATCH_BLOCKS", BATCH)


def kept_at(folder, layers=(0, 1), text="text", limit=LARGE, batch=BATCH):
    about = {"text": text, "context": CONTEXT}
    return KeptResiduals(tiny_model(), layers, about, batch, folder, limit)


def saes():
    return [
        random_sae("L00.z", seed=1), random_sae("L01.z", seed=2, normalize_activations="layer_norm"),
        random_sae("L01.H01.z", d_in=D_HEAD, seed=6),
    ]  # fmt: skip


def keep(store, residuals, blocks=range(BLOCKS)):
    """The corpus pass over some blocks, which keeps them."""
    ShardPass(tiny_model(), saes(), store, residuals).run(blocks, NullProgress())


def examples(n=40, blocks=range(BLOCKS)):
    rng = np.random.default_rng(0)
    feature, code = np.sort(rng.integers(0, 20, n)), np.full(n, TOP)
    block, position = rng.integers(blocks.start, blocks.stop, n), rng.integers(1, CONTEXT, n)
    return Kept(feature, code, np.arange(n), block, position)


def attributed(store, residuals=None, kept=None, blocks=range(BLOCKS)):
    """The bytes of what DFA takes down of each SAE."""
    work = DFAPass(tiny_model(), saes(), [kept or examples()] * 3, residuals, as_kept=True)
    work.run(store, blocks, NullProgress())
    found = []
    for rows, sums in zip(work.rows, work.sums, strict=True):
        found += [part.tobytes() for one in rows.parts for part in one]
        found += [part.tobytes() for part in vars(sums).values()]
    return found


class Refuses(Exception):
    """The model was asked."""


@pytest.fixture
def no_model(monkeypatch):
    """DFA may not run the model."""

    def refuse(*args, **kwargs):
        raise Refuses

    monkeypatch.setattr("atlas.analysis.second_look.capture", refuse)


def test_the_same_bits_without_asking_the_model(store, tmp_path, monkeypatch):
    expected, asked = attributed(store), []
    keep(store, kept_at(tmp_path))
    monkeypatch.setattr("atlas.analysis.second_look.capture", lambda *args: asked.append(args))
    assert attributed(store, kept_at(tmp_path)) == expected
    assert asked == []


def test_batches_are_taken_down_in_order_however_they_end(store, tmp_path, monkeypatch):
    """The first batch is read last, and rows and sums are those of one batch after the other."""
    expected, read = attributed(store), KeptResiduals.read

    def late(self, blocks, layer):
        time.sleep(0.3 if blocks[0] == 0 else 0)  # the others, in threads of their own, wait for it by then
        return read(self, blocks, layer)

    keep(store, kept_at(tmp_path))
    monkeypatch.setattr(KeptResiduals, "read", late)
    monkeypatch.setattr(dfa, "lanes", lambda: ThreadPoolExecutor(9))
    assert attributed(store, kept_at(tmp_path)) == expected


def test_without_them_the_model_is_asked(store, tmp_path, no_model):
    with pytest.raises(Refuses):
        attributed(store, kept_at(tmp_path))


def test_what_is_kept_is_what_enters_the_layers(store, tmp_path):
    keep(store, kept_at(tmp_path))
    x, _ = capture(tiny_model(), torch.from_numpy(TOKENS[4:8]), [Site("resid_pre", 0), Site("resid_pre", 1)])
    for site, entered in x.items():
        assert torch.equal(kept_at(tmp_path).read(np.arange(4, 8), site.layer), entered)
    with pytest.raises(StoreError, match="layer 2"):
        kept_at(tmp_path).read(np.arange(4, 8), 2)
    with pytest.raises(StoreError, match="not kept"):
        kept_at(tmp_path).read(np.arange(4, 7), 0)


def test_a_bound_stops_keeping_and_the_model_fills_in(store, tmp_path, monkeypatch):
    """Two of three batches fit; the model reads the text again, and every row is the same."""
    asked = []
    limit = int(2.9 * BATCH_BYTES)
    keep(store, kept_at(tmp_path, limit=limit))
    assert 2 * BATCH_BYTES < held_bytes(tmp_path) <= limit
    monkeypatch.setattr(
        "atlas.analysis.second_look.capture", lambda *args: asked.append(args[1]) or capture(*args)
    )
    expected = attributed(store)
    assert len(asked) == 3
    assert attributed(store, kept_at(tmp_path, limit=limit)) == expected
    assert len(asked) == 6, "of a part of the text that is not all there, the model reads all"


def test_a_damaged_file_comes_from_the_model(store, tmp_path, caplog):
    expected = attributed(store)
    keep(store, kept_at(tmp_path))
    path = sorted(tmp_path.glob("*/*.acts"))[1]
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))
    assert attributed(store, kept_at(tmp_path)) == expected
    assert "damaged" in caplog.text
    assert "model runs again" in caplog.text


@pytest.mark.parametrize("other", [{"text": "other"}, {"batch": 2}, {"layers": (0,)}])
def test_only_what_was_kept_of_this_text_in_these_batches_is_read(store, tmp_path, other):
    keep(store, kept_at(tmp_path))
    assert kept_at(tmp_path, **other).hold([np.arange(4)]) == ("layers" in other)
    kept = kept_at(tmp_path)
    assert kept.hold([np.arange(4), np.arange(8, 11)])
    assert not kept.hold([np.arange(4), np.array([8, 9, 10, 11])]), "one block is missing"
    assert not kept.hold([np.arange(1, 5)]), "of two batches"
    assert not kept.hold([np.arange(3)]), "a part of one"


def test_forgetting_a_shard_leaves_the_others(store, tmp_path):
    for blocks in (range(4), range(4, BLOCKS)):
        keep(store, kept_at(tmp_path), blocks)
    kept_at(tmp_path).forget(range(4))
    assert not kept_at(tmp_path).hold([np.arange(4)])
    assert kept_at(tmp_path).hold([np.arange(4, 8)])
    kept_at(tmp_path).forget(range(4, BLOCKS))
    assert held_bytes(tmp_path) == 0
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    kept_at(tmp_path).forget(range(4))


def test_a_folder_that_another_process_reads_stays(store, tmp_path):
    reader = kept_at(tmp_path)
    keep(store, kept_at(tmp_path))
    kept_at(tmp_path).forget(range(BLOCKS))
    assert held_bytes(tmp_path) == 0
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    keep(store, reader, range(4))
    assert kept_at(tmp_path).hold([np.arange(4)])


def test_other_texts_make_room(store, tmp_path):
    """What an interrupted build left does not keep the next one from keeping anything."""
    limit = int(2.9 * BATCH_BYTES)
    keep(store, kept_at(tmp_path, text="old", limit=limit))
    keep(store, kept_at(tmp_path, text="new", limit=limit))
    assert kept_at(tmp_path, text="new").hold([np.arange(4), np.arange(4, 8)])
    assert held_bytes(tmp_path) <= limit


def test_what_is_unused_can_be_removed(store, tmp_path):
    keep(store, kept_at(tmp_path))
    assert list(unused(tmp_path, 3600.0, remove=True)) == []
    reader = kept_at(tmp_path)
    assert list(unused(tmp_path, -1.0, remove=True)) == [], "in use"
    del reader
    (said,) = unused(tmp_path, -1.0, remove=False)
    assert said[1] == held_bytes(tmp_path) > 3 * BATCH_BYTES * 0.9
    assert list(unused(tmp_path, -1.0, remove=True)) == [said]
    assert held_bytes(tmp_path) == 0
    assert not said[0].exists()


def test_few_examples_are_looked_at_alone(store, tmp_path, monkeypatch):
    """Kept or not, fewer than half of the blocks: only those are run, in batches of their own."""
    asked = []
    monkeypatch.setattr(
        "atlas.analysis.second_look.capture", lambda *args: asked.append(args[1]) or capture(*args)
    )
    keep(store, kept_at(tmp_path))
    few = examples(4)
    blocks = sorted(set(few.block))
    assert len(blocks) < BLOCKS / 2
    assert attributed(store, kept_at(tmp_path), few) == attributed(store, None, few)
    expected = [TOKENS[blocks[start : start + BATCH]].tolist() for start in range(0, len(blocks), BATCH)]
    assert [tokens.tolist() for tokens in asked] == 2 * expected


def test_room_is_asked_for_a_shard_as_a_whole(store, tmp_path):
    limit = int(3.6 * BATCH_BYTES)
    bounded = kept_at(tmp_path, limit=limit)
    assert bounded.has_room(range(BLOCKS))
    assert not bounded.has_room(range(4 * BATCH))
    keep(store, bounded, range(8))
    assert not kept_at(tmp_path, limit=limit).has_room(range(8, 16))
    assert kept_at(tmp_path, limit=limit).has_room(range(8, 12))
    del bounded
    assert kept_at(tmp_path, text="other", limit=limit).has_room(range(BLOCKS)), "the first makes room"
    assert held_bytes(tmp_path) == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.data())
def test_batches_hold_every_block_that_is_asked_for_once(start, n, size, as_kept, data):
    within = range(start, start + n)
    kept = np.array(sorted(data.draw(st.sets(st.sampled_from(within)))), dtype=np.int64)
    found = batches(kept, within if as_kept else None, size)
    joined = np.concatenate([*found, np.empty(0, np.int64)])
    assert np.array_equal(joined, np.unique(joined))
    assert set(kept) <= set(joined) <= set(within)
    assert all(0 < len(one) <= size for one in found)
    if not as_kept or 2 * len(kept) < n:
        assert set(joined) == set(kept)
    else:
        assert all((one[0] - start) % size == 0 for one in found)
        assert all(len(one) == size or one[-1] == within[-1] for one in found)
