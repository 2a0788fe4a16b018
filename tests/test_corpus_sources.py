"""Corpus sources: what each yields, how it is named, and what is refused."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.corpus import python_text, text_files
from atlas.corpus.python_text import StandardLibrary
from atlas.corpus.sources import CorpusSource, Document, open_source
from atlas.errors import CorpusError


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def rows(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def read(spec: object) -> list[Document]:
    return list(open_source(str(spec)).documents())


def refused(spec: object) -> str:
    """The message of the CorpusError that opening and reading a spec raises; always one line."""
    with pytest.raises(CorpusError) as caught:
        read(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- the standard library


@pytest.fixture(scope="module")
def prefix() -> list[Document]:
    return list(itertools.islice(StandardLibrary().documents(), 120))


def test_stdlib_is_the_same_every_time(prefix: list[Document]):
    again = list(itertools.islice(open_source("stdlib").documents(), len(prefix)))
    assert again == prefix


def test_any_prefix_of_stdlib_is_a_mix(prefix: list[Document]):
    kinds = [document.source.split("/")[0] for document in prefix]
    assert set(kinds) == {"docs", "source", "topics"}
    assert max(map(kinds.count, set(kinds))) < 0.75 * len(kinds)
    chars: dict[str, int] = {}
    for document in prefix:
        chars[document.source] = chars.get(document.source, 0) + len(document.text)
    assert max(chars.values()) < 0.25 * sum(chars.values())


def test_stdlib_has_no_foreign_modules(prefix: list[Document]):
    names = "\n".join(document.source for document in prefix)
    assert "site-packages" not in names
    assert "/test/" not in names
    for document in prefix:
        kind, _, name = document.source.partition("/")
        if kind == "topics":
            continue
        assert (python_text._stdlib_root() / name).is_file()


def test_code_comes_without_its_docstrings():
    text = 'class A:\n    """About A\n    on two lines."""\n\n    x = 1\n\n\ndef f(): "short"\n'
    tree = python_text.ast.parse(text)
    assert python_text._docstrings(tree) == ["About A\non two lines.", "short"]
    assert python_text._without_docstrings(text, tree) == 'class A:\n\n    x = 1\n\n\ndef f(): "short"\n'


def test_a_form_feed_does_not_shift_the_lines():
    text = 'x = 1\n\x0c\ndef f():\n    """Doc."""\n    return 2\n'
    assert (
        python_text._without_docstrings(text, python_text.ast.parse(text))
        == "x = 1\n\x0c\ndef f():\n    return 2\n"
    )


def test_parts_of_a_module_keep_their_order_and_add_up():
    originals = [Document(f"{i}", chr(97 + i % 26) * (5_000 * i)) for i in range(1, 60)]
    dealt = list(python_text._dealt(iter(originals)))
    for original in originals:
        assert "".join(d.text for d in dealt if d.source == original.source) == original.text
    assert [d.source for d in dealt] != sorted((d.source for d in dealt), key=int)


def test_stdlib_identity_names_the_version_and_is_stable():
    first, second = StandardLibrary().identity(), StandardLibrary().identity()
    assert first == second
    version = ".".join(map(str, sys.version_info[:3]))
    assert first.startswith(f"stdlib python-{version} sha256:")


def test_packages_yield_each_docstring_once():
    documents = list(itertools.islice(open_source("packages").documents(), 150))
    assert len({d.text for d in documents}) == len(documents)
    assert all(d.source.startswith("packages/") for d in documents)
    assert open_source("packages").identity() == open_source("packages").identity()


def test_no_torch_is_imported():
    code = "import sys, atlas.corpus.sources; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- text files


def test_a_text_file_is_one_document(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffHello\r\nthere\n".encode())
    assert read(path) == [Document("a.txt", "Hello\nthere\n")]
    assert read(f"text:{path}") == read(path)


def test_any_name_can_be_text(tmp_path: Path):
    path = tmp_path / "README"
    path.write_text("Hi")
    assert read(f"text:{path}") == [Document("README", "Hi")]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path):
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "b/c.txt", "a.txt", "ignored.md"):
        (tmp_path / name).write_text(f"text of {name}")
    expected = [Document(name, f"text of {name}") for name in ("a.txt", "b/c.txt", "z.txt")]
    assert read(tmp_path) == read(f"text:{tmp_path}") == expected


def test_a_long_file_comes_in_parts_that_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "PART_CHARS", 100)
    text = "".join(f"line {i}\n" + "\n" * (i % 7 == 0) for i in range(200))
    path = tmp_path / "long.txt"
    path.write_text(text)
    parts = [document.text for document in read(path)]
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(100 <= len(part) <= 230 for part in parts[:-1])
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_without_blank_lines_a_part_still_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "PART_CHARS", 10)
    assert list(text_files._parts(["aaaa\n"] * 6)) == ["aaaa\n" * 4, "aaaa\n" * 2]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str):
    path = tmp_path / f"rows.jsonl{suffix}"
    data = rows({"text": "one", "source": "book"}, {"text": " \n"}, {"text": None}, {"text": "zwö"}) + b"\n"
    path.write_bytes(COMPRESSIONS[suffix](data))
    assert read(path) == [Document("book", "one"), Document(f"{path.name}:4", "zwö")]


def test_the_field_can_be_chosen(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows({"content": "one", "text": "other"}))
    assert read(f"{path}?field=content") == [Document("rows.jsonl:1", "one")]
    table = pa.table({"content": ["one"], "text": ["other"], "source": ["s"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read(f"{tmp_path}/rows.parquet?field=content") == [Document("s", "one")]
    assert read(f"{tmp_path}/rows.parquet?field=source") == [Document("rows.parquet:1", "s")]


def test_parquet_rows_over_several_groups(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    texts = [f"text {i}" if i % 5 else None for i in range(1000)]
    pq.write_table(pa.table({"text": texts, "n": range(1000)}), path, row_group_size=300)
    assert read(path) == [Document(f"rows.parquet:{i + 1}", t) for i, t in enumerate(texts) if t]


def test_unpaired_surrogates_are_replaced(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert read(path) == [Document("rows.jsonl:1", "a?b \U0001f600")]


def test_a_name_with_a_question_mark_is_found(tmp_path: Path):
    path = tmp_path / "a?field=b.txt"
    path.write_text("Hi")
    assert read(path) == [Document("a?field=b.txt", "Hi")]


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6),
    st.sampled_from(list(COMPRESSIONS)),
)
def test_whatever_is_written_is_read_back(tmp_path: Path, texts: list[str], suffix: str):
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](rows(*({"text": text, "source": "s"} for text in texts))))
    kept = [Document("s", text) for text in texts if text.strip()]
    if kept:
        assert read(path) == kept
    else:
        assert "holds no text" in refused(path)


# ---------------------------------------------------------------- names of sources


@pytest.fixture
def every_source(tmp_path: Path) -> list[CorpusSource]:
    (tmp_path / "a.txt").write_text("Hi")
    (tmp_path / "r.jsonl").write_bytes(rows({"my text": "Hi"}))
    pq.write_table(pa.table({"content": ["Hi"]}), tmp_path / "r.parquet")
    specs = [
        "stdlib",
        "packages",
        f"{tmp_path}/a.txt",
        f"text:{tmp_path}",
        f"{tmp_path}/r.jsonl?field=my+text",
    ]
    specs += [
        f"{tmp_path}/r.parquet?field=content",
        "hf:a/b",
        "hf:a/b:test?field=content&config=en&revision=abc",
    ]
    return [open_source(spec) for spec in specs]


def test_a_spec_opens_the_same_source_from_another_folder(
    every_source: list[CorpusSource],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for source in every_source:
        assert open_source(source.spec) == source
        assert isinstance(source, CorpusSource)


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("Hi")
    monkeypatch.chdir(tmp_path)
    assert open_source("a.txt").spec == f"text:{tmp_path.resolve()}/a.txt"
    assert open_source("text:a.txt") == open_source("./a.txt") == open_source(f"{tmp_path}/a.txt")


@pytest.mark.parametrize("name", ["a.txt", "r.jsonl", "r.parquet", "folder"])
def test_identity_follows_the_content_not_the_date_or_folder(tmp_path: Path, name: str):
    def write(folder: str, text: str) -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "folder":
            path.mkdir(exist_ok=True)
            (path / "x.txt").write_text(text)
        elif name == "a.txt":
            path.write_text(text)
        elif name == "r.jsonl":
            path.write_bytes(rows({"text": text}))
        else:
            pq.write_table(pa.table({"text": [text]}), path)
        return path

    path = write("one", "Hi")
    first = open_source(str(path)).identity()
    os.utime(path, (1, 1))
    assert open_source(str(path)).identity() == first
    assert open_source(str(write("two", "Hi"))).identity() == first
    assert open_source(str(write("one", "Ho"))).identity() != first
    assert "\n" not in first


def test_identity_knows_the_field(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(rows({"text": "a", "other": "b"}))
    assert open_source(str(path)).identity() != open_source(f"{path}?field=other").identity()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("", "corpus '' is not known; allowed: stdlib"),
        ("stdlob", "corpus 'stdlob' is not known; allowed: stdlib"),
        ("notes.docx", "corpus 'notes.docx' is not known"),
        ("missing.txt", "no file or folder 'missing.txt'"),
        ("missing.jsonl.xz", "no file or folder 'missing.jsonl.xz'"),
        ("no/such/folder", "no such file or folder"),
        ("text:", "no file or folder ''"),
        ("text:missing", "no file or folder 'missing'"),
        ("missing.parquet?column=x", "option column='x'; allowed: ?field=VALUE"),
        ("missing.parquet?field=", "option field=''; allowed: ?field=VALUE"),
        ("missing.parquet?field", "option field=''"),
        ("missing.txt?field=x", "option field; allowed for text files: none"),
        ("hf:", "names no dataset; allowed: hf:NAME[:split]"),
        ("hf:a/b?size=3", "option size='3'; allowed: ?field=VALUE, ?config=VALUE, ?revision=VALUE"),
    ],
)
def test_bad_specs(spec: str, part: str):
    assert part in refused(spec)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"ab\xff", "is not UTF-8"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is a JSON list; allowed: one object per line"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.jsonl", b'{"txt": "a", "id": 3}\n', "line 1 has no field 'text'; allowed with ?field=: txt, id"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' is int 3; allowed: text"),
        ("a.jsonl.xz", lzma.compress(rows({"text": "a" * 999}))[:-30], "is damaged"),
        ("a.jsonl.xz", b"no xz at all", "is damaged"),
        ("a.jsonl.gz", b"no gzip at all", "is damaged"),
        ("a.jsonl.gz", gzip.compress(rows({"text": "a" * 999}), mtime=0)[:-9], "is damaged"),
        ("a.jsonl.bz2", b"no bzip2 at all", "is damaged"),
        ("a.jsonl.zst", b"no zstd at all", "is damaged"),
        ("a.parquet", b"no parquet at all", "is damaged"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, part: str):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(path)
    assert part in message
    assert str(path) in message


def test_bad_folders(tmp_path: Path):
    assert "holds no .txt file" in refused(tmp_path)
    (tmp_path / "x.jsonl").mkdir()
    assert "is a folder; allowed: a file" in refused(tmp_path / "x.jsonl")


def test_bad_parquet_columns(tmp_path: Path):
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "x.parquet")
    assert "row 1: field 'text' is int 1; allowed: text" in refused(tmp_path / "x.parquet")
    missing = refused(f"{tmp_path}/x.parquet?field=content")
    assert "has no column 'content'; allowed with ?field=: text, body" in missing


def test_documents_before_a_broken_line_still_come(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{broken\n')
    documents = open_source(str(path)).documents()
    assert next(documents).text == "a"
    with pytest.raises(CorpusError):
        next(documents)


def test_a_file_that_vanishes_after_opening(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(rows({"text": "a"}))
    source = open_source(str(path))
    path.unlink()
    for act in (source.identity, lambda: list(source.documents())):
        with pytest.raises(CorpusError, match="cannot be read"):
            act()


# ---------------------------------------------------------------- the hub, by a stand-in for its library


class FakeDatasets(types.ModuleType):
    """What of the library is used: rows by name, and errors as it raises them."""

    def __init__(self, rows_by_name: dict[str, list[dict[str, Any]]]):
        super().__init__("datasets")
        self.rows_by_name = rows_by_name
        self.calls: list[tuple[object, ...]] = []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, revision: str | None, streaming: bool
    ):
        self.calls.append((name, config, split, revision, streaming))
        if name not in self.rows_by_name:
            raise ConnectionError("Couldn't reach the hub\n(offline)")
        return iter(self.rows_by_name[name])

    def load_dataset_builder(self, name: str, _config: str | None, *, revision: str | None):
        if name not in self.rows_by_name:
            raise ConnectionError("Couldn't reach the hub\n(offline)")
        return types.SimpleNamespace(hash=revision or "f00d")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    fake = FakeDatasets({"a/b": [{"text": "one"}, {"text": ""}, {"text": "two", "source": "s"}], "void": []})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_a_hub_dataset_is_streamed(hub: FakeDatasets):
    assert read("hf:a/b:test?config=en") == [Document("a/b:test:1", "one"), Document("s", "two")]
    assert hub.calls == [("a/b", "en", "test", None, True)]


def test_hub_identity(hub: FakeDatasets):
    assert open_source("hf:a/b").identity() == "hf:a/b:train hash:f00d"
    assert open_source("hf:a/b?revision=1").identity() != open_source("hf:a/b?revision=2").identity()


def test_hub_errors_are_one_line(hub: FakeDatasets):
    assert "cannot be streamed" in refused("hf:nobody/nothing")
    assert "offline" in refused("hf:nobody/nothing")
    assert "holds no text" in refused("hf:void")
    assert "has no column 'content'; allowed with ?field=: text" in refused("hf:a/b?field=content")
    with pytest.raises(CorpusError, match="cannot be streamed"):
        open_source("hf:nobody/nothing").identity()


def test_without_the_library_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the datasets library: pip install 'head-atlas[hub]'" in refused("hf:a/b")
