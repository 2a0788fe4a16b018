"""The app over a lake: it shows the release, and goes on with its copy while the store is away, saying so."""

from pathlib import Path
from uuid import uuid4

import pytest

from atlas.db.engine import close_engines
from atlas.settings import load_settings
from atlas.store.lake.errors import LakeUnreachableError
from atlas.store.lake.folders import file_digest
from atlas.store.lake.releases import releases_of
from atlas.store.lake.remote import Remote
from atlas.store.lake.shelf import Shelf, Version
from atlas.store.release import ReleaseInfo, list_releases
from tests.synthetic import build_synthetic_release
from tests.test_app_views import show, words


@pytest.fixture
def lake(tmp_path, monkeypatch):
    build_synthetic_release(tmp_path / "made", n_layers=2, d_sae=16, n_blocks=12)
    (info,) = list_releases(tmp_path / "made")
    url = f"memory://{uuid4().hex}"
    put(url, info)
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path / "reader"))
    monkeypatch.setenv("ATLAS_LAKE_URL", url)
    monkeypatch.setenv("ATLAS_LAKE_SECONDS", "0")
    yield url
    releases_of.cache_clear()
    close_engines()


def put(url: str, info: ReleaseInfo) -> None:
    size, sha256 = info.path.stat().st_size, file_digest(info.path)
    version = Version(info.version, "", info.digest, info.created, size, sha256, 1)
    Shelf(Remote(url)).add(info.name, info.path, version)


def test_the_app_shows_a_release_of_the_lake(lake, monkeypatch):
    assert "Atlas of synthetic" in words(show("atlas"))
    settings = load_settings()
    assert [path.parent.name for path in Path(settings.releases).glob("*/s*.duckdb")] == ["synthetic"]

    def away(self, *_):
        raise LakeUnreachableError(f"lake {self.url}: cannot read: away")

    for name in ("read", "folders"):
        monkeypatch.setattr(Remote, name, away)
    text = words(show("atlas"))
    assert "Atlas of synthetic" in text
    assert "cannot read: away" in text.replace("\\", "")
    assert "copied here before" in text


def test_an_empty_lake_says_where_it_looked(tmp_path, monkeypatch):
    url = f"memory://{uuid4().hex}"
    monkeypatch.setenv("ATLAS_LAKE_URL", url)
    text = words(show("atlas")).replace("\\", "")
    assert "no release yet" in text
    assert f"Looked in {url}" in text
    close_engines()
