"""The text that Python itself carries: the standard library, and the docstrings of installed packages."""

import ast
import hashlib
import importlib.metadata
import itertools
import os
import platform
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atlas.corpus.documents import Document, add_content, nonblank

MIN_DOCSTRING = 80  # shorter ones are mostly stubs, alike in every module
MIN_SOURCE = 200
SHUFFLE_SEED = 0
MODULE_PART_CHARS = 16_384  # a longer module is cut here ...
MODULES_MIXED = 32  # ... and the parts of this many modules are dealt out at random

# Left out of the standard library: what distributions package separately or build per machine (so that the
# text depends on the version of Python and on little else), tests, the topics' own module, and the tables
# of code pages, a megabyte of hexadecimal.
_NOT_STDLIB = frozenset(
    {
        *("__pycache__", "site-packages", "dist-packages", "lib-dynload", "ensurepip", "lib2to3"),
        *("tkinter", "turtledemo", "idlelib", "idle_test", "test", "tests", "pydoc_data", "encodings"),
    }
)
_BUILT_PER_MACHINE = ("config-", "_sysconfigdata")
_NOT_PACKAGES = frozenset({"__pycache__", "test", "tests"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class StandardLibrary:
    """The running Python's standard library: each module's docstrings, its code without them, pydoc's topics.

    Docstrings are taken out of the code, so no text comes twice and a held-out part is really held out.
    Modules are shuffled with a fixed seed and long ones dealt out in parts: any prefix is a mix of prose
    and code, and no single large module fills it.
    """

    spec: str = "stdlib"

    def identity(self) -> str:
        """Return the Python version and a digest of every file and topic read."""
        digest = hashlib.sha256()
        root = _stdlib_root()
        for path in _python_files(root, _NOT_STDLIB):
            add_content(digest, path.relative_to(root).as_posix(), path.read_bytes())
        for name, text in sorted(pydoc_data.topics.topics.items()):
            add_content(digest, name, text.encode())
        return f"stdlib python-{platform.python_version()} sha256:{digest.hexdigest()}"

    def documents(self) -> Iterator[Document]:
        """Yield the documents in the seeded order."""
        return nonblank(self.spec, _dealt(self._modules()))

    def _modules(self) -> Iterator[Document]:
        root = _stdlib_root()
        names = [path.relative_to(root).as_posix() for path in _python_files(root, _NOT_STDLIB)]
        topics = pydoc_data.topics.topics
        order = [(kind, name) for name in names for kind in ("docs", "source")]
        order += [("topics", name) for name in sorted(topics)]
        random.Random(SHUFFLE_SEED).shuffle(order)  # noqa: S311 - an order, not a secret
        for kind, name in order:
            text = topics[name] if kind == "topics" else _module_text(root / name, kind)
            yield Document(f"{kind}/{name}", text)


@dataclass(frozen=True)
class InstalledPackages:
    """Docstrings of the packages installed beside this one, each text once, in order of the files' names."""

    spec: str = "packages"

    def identity(self) -> str:
        """Return a digest of the installed distributions and their versions (which fix the text)."""
        found = {(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()}
        digest = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()
        return f"packages python-{platform.python_version()} sha256:{digest}"

    def documents(self) -> Iterator[Document]:
        """Yield one document per module that has docstrings not seen in an earlier module."""
        return nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_paths()["purelib"])
        seen: set[bytes] = set()
        for path in _python_files(root, _NOT_PACKAGES):
            fresh = []
            for text in _docstrings(_parse(path)[1]):
                key = hashlib.blake2b(text.encode("utf8", "replace"), digest_size=12).digest()
                if len(text) > MIN_DOCSTRING and key not in seen:
                    seen.add(key)
                    fresh.append(text)
            yield Document(f"packages/{path.relative_to(root).as_posix()}", "\n\n".join(fresh))


def _dealt(documents: Iterator[Document]) -> Iterator[Document]:
    """Cut documents into parts and yield the next part of a random one among MODULES_MIXED, each in order."""
    rng = random.Random(SHUFFLE_SEED)  # noqa: S311 - an order, not a secret
    hands = [_cut(document) for document in itertools.islice(documents, MODULES_MIXED)]
    while hands:
        place = rng.randrange(len(hands))
        part = next(hands[place], None)
        if part is not None:
            yield part
        elif (following := next(documents, None)) is not None:
            hands[place] = _cut(following)
        else:
            hands.pop(place)


def _cut(document: Document) -> Iterator[Document]:
    """Yield a document's parts of MODULE_PART_CHARS characters.

    >>> [len(part.text) for part in _cut(Document("a.py", "x" * 40_000))]
    [16384, 16384, 7232]
    """
    for start in range(0, len(document.text), MODULE_PART_CHARS):
        yield Document(document.source, document.text[start : start + MODULE_PART_CHARS])


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _python_files(root: Path, skip: frozenset[str]) -> list[Path]:
    """Return the Python files below ``root`` without the skipped folders, ordered by relative name."""

    def wanted(name: str) -> bool:
        return name not in skip and not name.startswith(_BUILT_PER_MACHINE)

    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(wanted, folders)  # os.walk does not enter what is taken out here
        found += (Path(folder, name) for name in names if name.endswith(".py") and wanted(name))
    return sorted(found, key=Path.as_posix)


def _parse(path: Path) -> tuple[str, ast.Module]:
    """Return a module's text and syntax tree; both empty if it is not the running Python's syntax."""
    try:
        text = path.read_text(encoding="utf8")
        return text, ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return "", ast.Module(body=[], type_ignores=[])


def _docstrings(tree: ast.Module) -> list[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _without_docstrings(text: str, tree: ast.Module) -> str:
    """Return the code without the lines of its docstrings (those that share a line with code stay)."""
    gone: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
            first = node.body[0]
            if first.lineno > getattr(node, "lineno", 0):
                gone.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    # Not splitlines(): it also cuts at form feeds, which do not count as lines in the tree.
    return "\n".join(line for i, line in enumerate(text.split("\n"), 1) if i not in gone)


def _module_text(path: Path, kind: str) -> str:
    """Return a module's docstrings or its code, or nothing if it has hardly any."""
    text, tree = _parse(path)
    if kind == "source":
        code = _without_docstrings(text, tree)
        return code if len(code) > MIN_SOURCE else ""
    docs = _docstrings(tree)
    return "\n\n".join(docs) if sum(map(len, docs)) > MIN_DOCSTRING else ""
