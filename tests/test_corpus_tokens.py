"""The token store: its blocks put together again are the stream of documents, whatever is cut where."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.corpus import tokens
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
