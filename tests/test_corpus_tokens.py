"""The token store: its blocks put together again are the stream of documents, whatever is cut where."""

import gc
import json
import tracemalloc
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.corpus import tokens
from atlas.corpus.stores import TextStores, extension_ranges
from atlas.corpus.tokens import TokenStore, bos_id, build_token_store, load_tokenizer, visible, vocabulary
from atlas.errors import CorpusError, ModelError
from atlas.lm.files import find_model
from atlas.progress import NullProgress

from .tiny import WORDS, model_folder, random_tokens, save_store

BOS = 0


class Document(NamedTuple):
    source: str
    text: str


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(model_folder())


@pytest.fixture(scope="module")
def byte_level():
    return load_tokenizer(find_model("docs-2l").path)


def documents_of(lists):
    return [Document(f"d{i}", " ".join(WORDS[t] for t in ids)) for i, ids in enumerate(lists)]


def build(folder, lists, tokenizer, context=5, blocks=1000, **more):
    folder.mkdir(exist_ok=True)
    meta = build_token_store(
        folder,
        "c",
        documents_of(lists),
        tokenizer,
        context=context,
        blocks=blocks,
        progress=NullProgress(),
        **more,
    )
    return meta, TokenStore(folder)


def joined(lists):
    """(token, document) of the stream: documents joined by BOS, which belongs to the document it opens."""
    out = []
    for number, ids in enumerate(lists):
        if ids:
            out += [(BOS, number)] * (len(out) > 0) + [(t, number) for t in ids]
    return out


@settings(max_examples=60, deadline=None)
@given(
    lists=st.lists(st.lists(st.integers(1, len(WORDS) - 1), max_size=12), min_size=1, max_size=6),
    context=st.integers(2, 6),
    limit=st.integers(1, 12),
    seed=st.integers(0, 5),
    batch_chars=st.sampled_from([1, 20, 1 << 20]),
)
def test_blocks_are_the_stream(tmp_path_factory, words, lists, context, limit, seed, batch_chars):
    stream = joined(lists)
    runs = [stream[i : i + context - 1] for i in range(0, len(stream), context - 1)]
    runs = [run for run in runs if len(run) == context - 1][:limit]
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_BATCH_CHARS", batch_chars)
        if not runs:
            with pytest.raises(CorpusError):
                build(folder, lists, words, context, limit, seed=seed)
            return
        meta, store = build(folder, lists, words, context, limit, seed=seed)
    order = np.random.default_rng(seed).permutation(len(runs))
    assert meta.n_blocks == len(store) == len(runs)
    assert store.blocks(range(len(store))).tolist() == [[BOS, *(t for t, _ in runs[i])] for i in order]
    assert [store.source(b) for b in range(len(store))] == [f"d{runs[i][0][1]}" for i in order]


def test_blocks_can_be_asked_for_in_any_order(tmp_path, words):
    _, store = build(tmp_path / "s", [list(range(1, 41))], words)
    whole = store.blocks(range(len(store)))
    assert whole.dtype == np.int64
    assert whole.shape == (10, 5)
    assert (whole[:, 0] == BOS).all()
    assert store.blocks([7, 0, 7]).tolist() == whole[[7, 0, 7]].tolist()
    assert sorted(whole[:, 1:].ravel().tolist()) == list(range(1, 41))


def test_a_prefix_is_a_mix_of_the_text(tmp_path, words):
    """The held-out first blocks must not be the beginning of the text."""
    _, store = build(tmp_path / "s", [[1] * 400, [2] * 400], words)
    assert {store.source(b) for b in range(20)} == {"d0", "d1"}


def test_meta_says_what_was_read(tmp_path, words):
    meta, store = build(tmp_path / "s", [[1, 2, 3], [4, 5, 6]], words, context=4)
    assert (meta.context, meta.n_blocks, meta.bos, meta.dtype, meta.documents) == (4, 2, BOS, "uint16", 2)
    assert meta.characters == 2 * len("w0 w1 w2")
    assert store.meta == meta


@pytest.mark.parametrize("lists", [[], [[]]])
def test_no_text(tmp_path, words, lists):
    with pytest.raises(CorpusError, match="holds no text"):
        build(tmp_path / "s", lists, words)


def test_empty_documents_alone_are_no_text(tmp_path, words):
    with pytest.raises(CorpusError, match="holds no text"):
        build(tmp_path / "s", [[]] * 50, words)


def test_too_little_text(tmp_path, words):
    with pytest.raises(CorpusError, match=r"3 tokens.*needs 4"):
        build(tmp_path / "s", [[1, 2, 3]], words, context=5)
    with pytest.raises(CorpusError, match=r"gives 2 blocks.*at least 3"):
        build(tmp_path / "s", [[1] * 9], words, context=5, least_blocks=3)


def test_a_tokenizer_without_bos_or_eos(tmp_path, words):
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(ModelError, match="BOS"):
        build(tmp_path / "s", [[1, 2, 3]], Bare())


def test_eos_stands_in_for_bos():
    class OnlyEos:
        bos_token_id, eos_token_id = None, 7

    assert bos_id(OnlyEos()) == 7


# ---------------------------------------------------------------- text that is added later

LISTS = st.lists(st.lists(st.integers(1, len(WORDS) - 1), max_size=25), min_size=1, max_size=8)


def stored(store):
    """Every (source, tokens) of a store, as a sorted list."""
    return sorted((store.source(b), store.blocks([b])[0].tolist()) for b in range(len(store)))


@settings(max_examples=60, deadline=None)
@given(lists=LISTS, context=st.integers(2, 6), first=st.integers(1, 6), wanted=st.integers(1, 40))
def test_a_store_and_its_extensions_are_one_long_store(
    tmp_path_factory, words, lists, context, first, wanted
):
    root = tmp_path_factory.mktemp("grown")
    ranges = extension_ranges(first, wanted)
    long_one = ranges[-1].stop if ranges else first
    _, whole = build(root / "whole", lists, words, context, long_one, least_blocks=0)
    parts = [build(root / "0", lists, words, context, first, least_blocks=0)[1]]
    for number, blocks in enumerate(ranges, 1):
        _, part = build(
            root / str(number), lists, words, context, len(blocks), skip=blocks.start, least_blocks=0
        )
        assert len(part) == max(0, min(len(whole), blocks.stop) - blocks.start)
        parts.append(part)
    text = TextStores(parts)
    assert len(text) == len(whole) == text.meta.n_blocks
    assert stored(text) == stored(whole)
    for part, blocks in zip(parts, [range(first), *ranges], strict=True):
        _, prefix = build(root / f"to {blocks.stop}", lists, words, context, blocks.stop, least_blocks=0)
        _, shorter = build(root / f"to {blocks.start}", lists, words, context, blocks.start, least_blocks=0)
        assert sorted(stored(part) + stored(shorter)) == stored(prefix)


@given(first=st.integers(1, 50), wanted=st.integers(0, 5000), more=st.integers(0, 5000))
def test_more_text_leaves_the_ranges_as_they_are(first, wanted, more):
    few, many = extension_ranges(first, wanted), extension_ranges(first, wanted + more)
    assert many[: len(few)] == few
    covered = [*range(first), *(block for r in few for block in r)]
    assert covered == list(range(len(covered)))
    assert len(covered) >= wanted
    assert not few or few[-1].start < wanted
    assert all(len(r) == r.start for r in few)


def test_a_first_store_without_blocks_has_no_extensions():
    with pytest.raises(CorpusError, match="0 blocks"):
        extension_ranges(0, 5)


def test_an_extension_is_the_same_bytes_whatever_follows(tmp_path, words):
    """Only its own range decides what it holds: documents behind it do not."""
    lists = [[1 + (i + j) % 40 for j in range(23)] for i in range(30)]
    build(tmp_path / "a", lists, words, blocks=20, skip=20)
    build(tmp_path / "b", [*lists, [3] * 999], words, blocks=20, skip=20)
    for name in ("tokens.bin", "sources.json", "meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["meta.json", "sources.json", "tokens.bin"]


def test_an_extension_is_mixed_within_itself(tmp_path, words):
    _, store = build(tmp_path / "s", [[1] * 400, [2] * 400], words, skip=40, blocks=120)
    assert {store.source(b) for b in range(20)} == {"d0", "d1"}


def test_extensions_of_one_size_are_mixed_differently(tmp_path, words):
    lists = [[1 + i // 4 % 46 for i in range(4 * 92)]]
    orders = [
        build(tmp_path / str(skip), lists, words, skip=skip, blocks=46)[1].blocks(range(46))[:, 1].tolist()
        for skip in (0, 46)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_meta_of_an_extension_counts_its_own_documents(tmp_path, words):
    meta, _ = build(tmp_path / "s", [[1, 2, 3], [4, 5, 6], [7] * 7], words, context=4, skip=1, blocks=2)
    assert (meta.n_blocks, meta.documents, meta.characters) == (2, 2, len("w3 w4 w5") + 7 * 3 - 1)


def test_an_extension_after_the_end_of_the_text(tmp_path, words):
    meta, store = build(tmp_path / "s", [[1] * 9], words, skip=2, least_blocks=0)
    assert meta.n_blocks == len(store) == len(store.blocks(range(0))) == 0
    with pytest.raises(CorpusError, match="1 tokens after its first 2 blocks; one block needs 4"):
        build(tmp_path / "t", [[1] * 9], words, skip=2)
    with pytest.raises(CorpusError, match="no text after its first 9 blocks"):
        build(tmp_path / "u", [[1] * 9], words, skip=9)


@pytest.fixture
def grown(tmp_path, words):
    """A store, an empty one and an extension, as one; and their blocks as an array."""
    lists = [[1 + (i * j) % 46 for j in range(17)] for i in range(9)]
    parts = [
        build(tmp_path / "a", lists, words, blocks=7)[1],
        build(tmp_path / "b", lists, words, skip=999, least_blocks=0)[1],
        build(tmp_path / "c", lists, words, skip=7, blocks=14)[1],
    ]
    return TextStores(parts), np.concatenate([part.blocks(range(len(part))) for part in parts])


def test_several_stores_read_as_one(grown):
    text, whole = grown
    assert len(text) == 21
    assert text.blocks(range(21)).tolist() == whole.tolist()
    assert text.blocks([20, 0, 7, 6, 20]).tolist() == whole[[20, 0, 7, 6, 20]].tolist()
    assert text.blocks(np.int64(8)).tolist() == whole[8].tolist()
    assert text.blocks(range(0)).shape == (0, 5)
    block, position = np.array([20, 0, 7, 6]), np.array([1, 2, 3, 4])
    assert text.at(block, position).tolist() == whole[block, position].tolist()
    assert text.at(block[:, None], position).tolist() == whole[block[:, None], position].tolist()


@pytest.mark.parametrize("block", [-1, 21, 99])
def test_blocks_outside_of_the_text(grown, block):
    for ask in (lambda: grown[0].blocks([0, block]), lambda: grown[0].source(block)):
        with pytest.raises(IndexError, match=str(block)):
            ask()


@pytest.mark.parametrize(
    ("name", "value"), [("context", 6), ("bos", 3), ("dtype", "uint32"), ("corpus", "other")]
)
def test_stores_of_different_texts_are_not_joined(grown, tmp_path, name, value):
    store = TokenStore(save_store(tmp_path / "s", random_tokens(3)))
    other = TokenStore(save_store(tmp_path / "s", random_tokens(3)))
    other.meta = replace(store.meta, **{name: value})
    with pytest.raises(CorpusError, match=rf"agree in {name}.*{value!r}"):
        TextStores([store, other])


def test_no_stores_are_no_text():
    with pytest.raises(CorpusError, match="at least one"):
        TextStores([])


def test_building_needs_little_memory(tmp_path, words):
    """1 MB of tokens; neither they nor the skipped ones may be held, as lists least of all."""
    lists = [[1 + (i + j) % 46 for j in range(500)] for i in range(2000)]
    texts = documents_of(lists)
    more = {"context": 100, "progress": NullProgress(), "skip": 5000}
    for part in (texts[:1], texts):  # the first run fills caches
        gc.collect()
        tracemalloc.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokens, "_BATCH_CHARS", 1 << 12)
            build_token_store(tmp_path, "c", part, words, blocks=5000, least_blocks=0, **more)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(TokenStore(tmp_path)) == 5000
    assert peak < 5000 * 100 * 2


# ---------------------------------------------------------------- damage


@pytest.fixture
def folder(tmp_path):
    return save_store(tmp_path / "store", random_tokens(6))


def test_the_store_that_the_damage_tests_damage_is_whole(folder):
    assert TokenStore(folder).blocks(range(6)).tolist() == random_tokens(6).tolist()


@pytest.mark.parametrize("change", [-1, -2, -20, 2])
def test_a_token_file_of_another_size(folder, change):
    path = folder / "tokens.bin"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x" * change)
    with pytest.raises(CorpusError, match=str(120 + change)):
        TokenStore(folder)


@pytest.mark.parametrize("name", ["tokens.bin", "meta.json", "sources.json"])
def test_a_missing_or_empty_file(folder, name):
    (folder / name).write_bytes(b"")
    with pytest.raises(CorpusError):
        TokenStore(folder)
    (folder / name).unlink()
    with pytest.raises(CorpusError) as caught:
        TokenStore(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sources", ["[]", "{}", '{"names": ["d"], "block_document": [0]}'])
def test_damaged_sources(folder, sources):
    (folder / "sources.json").write_text(sources)
    with pytest.raises(CorpusError, match="cannot be read"):
        TokenStore(folder)


@pytest.mark.parametrize("meta", ["[]", "{}", '{"context": 5}', "null", "\x00"])
def test_damaged_meta(folder, meta):
    (folder / "meta.json").write_text(meta)
    with pytest.raises(CorpusError):
        TokenStore(folder)


@pytest.mark.parametrize(("key", "value"), [("dtype", "nonsense"), ("context", "x"), ("n_blocks", 0)])
def test_meta_with_a_bad_value(folder, key, value):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(CorpusError):
        TokenStore(folder)


@pytest.mark.parametrize(
    "content", [b"{", b"\x22text\x22", b"\xff\xfe", b"{}", b"{\x22added_tokens\x22: []}"]
)
def test_a_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- what tokens look like


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        (" a b", "·a·b"),
        ("\r\n\n\r\t", "⏎⏎␍⇥"),
        ("é日", "é日"),
        ("\x00\x1b", "\\x00\\x1b"),
        ("\u200b\ufeff", "\\x200b\\xfeff"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_bytes_of_tokens_spell_the_text(byte_level):
    """Whatever the text, the tokens' bytes joined are the text's bytes."""
    _, raw = vocabulary(byte_level, len(byte_level))
    for text in ("def f(x):\n\treturn  x", "naïve 日本 🎉 \x00\x7f ­", "a" * 50):
        ids = byte_level(text, add_special_tokens=False)["input_ids"]
        assert b"".join(raw[i] for i in ids) == text.encode()


def test_visible_forms_of_a_byte_level_vocabulary(byte_level):
    texts, raw = vocabulary(byte_level, len(byte_level) + 3)
    assert len(texts) == len(raw) == len(byte_level) + 3
    assert texts[0] == "<|endoftext|>"
    assert texts[-3:] == [f"<unused {len(byte_level) + i}>" for i in range(3)]
    assert raw[-3:] == [b""] * 3
    broken = 0
    for text, data in list(zip(texts, raw, strict=True))[1 : len(byte_level)]:
        assert text.isprintable()
        assert " " not in text
        try:
            assert text == visible(data.decode("utf8"))
        except UnicodeDecodeError:
            broken += 1
            assert text == "".join(f"\\x{b:02x}" for b in data)
    assert broken > 50, "half of the single bytes are no UTF-8 by themselves"
    assert len(set(raw[1 : len(byte_level)])) == len(byte_level) - 1


def test_a_vocabulary_of_words(words):
    texts, raw = vocabulary(words, len(WORDS))
    assert texts == list(WORDS)
    assert raw == [w.encode() for w in WORDS]


def test_a_smaller_vocabulary_than_the_tokenizer(words):
    assert vocabulary(words, 4)[0] == list(WORDS[:4])


def sentencepiece_like():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "▁the", "é", "▁", "日", "ÿ", "a", "<0x0A>", "<0xFF>"]
    bpe = models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True)
    inner = Tokenizer(bpe)
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def test_letters_of_a_sentencepiece_vocabulary_are_letters():
    """There "é" is a letter, not the byte that byte-level BPE writes so."""
    texts, raw = vocabulary(sentencepiece_like(), 9)
    assert texts == ["<s>", "·the", "é", "·", "日", "ÿ", "a", "⏎", "\\xff"]
    assert raw == [b"<s>", b" the", "é".encode(), b" ", "日".encode(), "ÿ".encode(), b"a", b"\n", b"\xff"]
