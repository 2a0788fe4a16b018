"""The release that a build of the small world makes, and what it has to agree with."""

import atexit
import shutil
import tempfile
from collections import defaultdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from atlas.analysis.acts import FeatureActs
from atlas.pipeline.execute import output_of
from atlas.pipeline.local import run_local
from atlas.pipeline.plan import make_plan
from atlas.sae.files import load_sae
from atlas.sae.library import folder_of
from atlas.store.connection import open_release
from atlas.store.release import current
from tests.builds import Quiet, settings_at
from tests.reference import CONTEXT, Model, ReferenceSAE, Run, make_world, site_of

Row = dict[str, Any]


class Evidence:
    """One SAE of the release: what it does in float64, what was recorded of it, and its rows."""

    def __init__(
        self, built: "Release", sae: ReferenceSAE, x: np.ndarray, grad: np.ndarray, recorded: np.ndarray
    ) -> None:
        self.built, self.sae, self.name, self.d_sae = built, sae, sae.name, sae.d_sae
        self.x, self.grad = x, grad
        self.acts = recorded
        """Recorded activations [blocks, context, d_sae], float32; zero at position 0."""
        self.pre = sae.preactivations(x)

    def of(self, table: str) -> dict[int, list[Row]]:
        """Its rows of a table, by feature."""
        return self.built.of(table, self.name)

    def fires(self, f: int) -> list[tuple[int, int, np.float32]]:
        """(block, position, activation) where a feature fires, in the order of the text."""
        block, position = np.nonzero(self.acts[:, :, f])
        return [(b, p, self.acts[b, p, f]) for b, p in zip(block.tolist(), position.tolist(), strict=True)]

    def strongest(self, f: int) -> list[tuple[int, int, np.float32]]:
        """The same from the strongest down; ties to the earlier token."""
        return sorted(self.fires(f), key=lambda fire: (-fire[2], fire[0], fire[1]))


class Release:
    """A built release, its steps, and the world it is about."""

    def __init__(self, root: Path, processing: str) -> None:
        self.root, self.config = root, make_world(root, processing)
        self.settings = settings_at(root)
        self.plan = make_plan(self.config, self.settings)
        run_local(self.plan, self.settings, Quiet)
        self.model = Model(root / "tiny", processing)
        self._tables: dict[str, list[Row]] = {}
        self._by_feature: dict[str, dict[str, dict[int, list[Row]]]] = {}

    def rows(self, name: str) -> list[Row]:
        """Every row of a table, in its order."""
        if name not in self._tables:
            with open_release(current(self.root / "releases", "tiny").path) as connection:
                self._tables[name] = connection.sql(f"SELECT * FROM {name}").arrow().read_all().to_pylist()
        return self._tables[name]

    def of(self, name: str, sae: str) -> dict[int, list[Row]]:
        """The rows of one SAE by feature, in their order."""
        if name not in self._by_feature:
            found = self._by_feature[name] = defaultdict(lambda: defaultdict(list))
            for row in self.rows(name):
                found[row["sae"]][row["feature"]].append(row)
        return self._by_feature[name][sae]

    @cached_property
    def tokens(self) -> np.ndarray:
        """[blocks, context] of the analysed text, as the release holds it."""
        return np.array([row["tokens"] for row in self.rows("docs")])

    @cached_property
    def run(self) -> Run:
        """The model on the analysed text."""
        return self.model.run(self.tokens)

    @cached_property
    def evidence(self) -> list[Evidence]:
        """Every SAE, in the plan's order."""
        shards = [output_of(step, self.settings) for step in self.plan.of_kind("shard")]
        found = []
        for number, name in enumerate(self.plan.sae_names):
            sae = load_sae(folder_of(self.root, name))
            x, grad = (site_of(values, sae) for values in (self.run.acts, self.run.grads))
            parts = [FeatureActs.load(folder / f"acts-{number:05d}") for folder in shards]
            found.append(Evidence(self, ReferenceSAE(sae), x, grad, self._dense(parts, sae.d_sae)))
        return found

    def _dense(self, parts: list[FeatureActs], d_sae: int) -> np.ndarray:
        out = np.zeros((len(self.tokens), CONTEXT, d_sae), np.float32)
        for part in parts:
            out[part.block, part.position, part.feature] = part.value
        return out


def release(processing: str) -> Release:
    """The release, built once per test run and processing, even if that fails."""
    found = _release(processing)
    if isinstance(found, Exception):
        raise found
    return found


@cache
def _release(processing: str) -> Release | Exception:
    root = Path(tempfile.mkdtemp(prefix="atlas-reference-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    try:
        return Release(root, processing)
    except Exception as error:  # noqa: BLE001 - kept for the next test that asks
        return error


# ---------------------------------------------------------------- how things are compared


def same(found: Any, expected: Any, where: object, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal up to a tolerance; None and NaN are the same nothing."""
    nothing = [v is None or (isinstance(v, float | np.floating) and np.isnan(v)) for v in (found, expected)]
    if any(nothing):
        assert all(nothing), (where, found, expected)
        return
    close = np.shape(found) == np.shape(expected) and np.allclose(found, expected, rtol=rtol, atol=atol)
    assert close, (where, found, expected)


def same_ranking(
    found: list[tuple[Any, float]], scores: dict[Any, float], n: int, where: object, atol: float
) -> None:
    """The ``n`` largest scores, largest first; scores closer than ``atol`` may change places."""
    wanted = sorted(scores.values(), reverse=True)[:n]
    assert len(found) == len(wanted), (where, len(found), len(wanted))
    assert len({key for key, _ in found}) == len(found), (where, "twice")
    for place, ((key, value), score) in enumerate(zip(found, wanted, strict=True)):
        assert abs(value - scores[key]) <= atol, (where, key, value, scores[key])
        assert abs(value - score) <= atol, (where, place, key, value, score)
