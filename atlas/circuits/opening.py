"""A model and its SAEs, opened from a release: what every circuit experiment begins with.

from atlas.circuits.opening import open_circuits
bench = open_circuits()                      # the release published last
trace = bench.tracer().trace("The cat sat", bench.name("L05.z"), feature=12)
with bench.splice(["L05.z"]) as run:
    logits = run.logits(bench.tokens("The cat sat"))
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Int
from torch import Tensor

from atlas.circuits.edits import Edit
from atlas.circuits.passes import tokenise
from atlas.circuits.splice import Splice
from atlas.circuits.trace import ATTENTION, Tracer
from atlas.configs import ModelConfig
from atlas.errors import ModelError, SAEError
from atlas.interop.exporting import find_sae
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.sae.model import SAE
from atlas.settings import Settings, load_settings
from atlas.store.connection import cursor, open_release
from atlas.store.published import current
from atlas.store.queries import overview
from atlas.store.release import ReleaseInfo


@dataclass(frozen=True)
class Bench:
    """A loaded model and SAEs by name."""

    model: LanguageModel
    saes: dict[str, SAE]
    release: ReleaseInfo

    def name(self, text: str) -> str:
        """The SAE that ``text`` means: its name, or its site (``L05.z``) if one SAE alone has that.

        Raises SAEError naming what there is.
        """
        if text in self.saes:
            return text
        found = [name for name, sae in self.saes.items() if sae.info.site.name == text]
        if len(found) != 1:
            told = ", ".join(found or self.saes)
            raise SAEError(f"SAE {text!r} is {'not unique' if found else 'not known'}; allowed: {told}")
        return found[0]

    def tokens(self, text: str) -> Int[Tensor, "one pos"]:
        """BOS and the text's tokens as a batch of one."""
        return tokenise(self.model, text)[None].to(self.model.device)

    def splice(
        self,
        saes: Iterable[str] | None = None,
        edits: Sequence[Edit] = (),
        error: bool = True,
        gradients: bool = False,
    ) -> Splice:
        """SAEs, by name or site (all of them by default), in the model's forward pass; see ``Splice``."""
        names = [self.name(one) for one in saes] if saes is not None else list(self.saes)
        return Splice(self.model, [self.saes[name] for name in names], edits, error, gradients)

    @cached_property
    def _tracer(self) -> Tracer:
        return Tracer(self.model, one_per_layer(self.saes.values()))

    def tracer(self) -> Tracer:
        """Recursive DFA through the SAEs: per layer the first on z (else attn_out), and on resid_pre."""
        return self._tracer


def one_per_layer(saes: Iterable[SAE]) -> list[SAE]:
    """Per layer one SAE on attention output, z before attn_out, and one on resid_pre; the first of each."""
    chosen: dict[tuple[str, int], SAE] = {}
    known = [sae for sae in saes if sae.info.site.head is None]
    for kind in (*ATTENTION, "resid_pre"):
        for sae in known:
            if sae.info.site.kind == kind:
                role = "attention" if kind in ATTENTION else kind
                chosen.setdefault((role, sae.info.site.layer), sae)
    return list(chosen.values())


def open_circuits(
    release: str | None = None,
    settings: Settings | None = None,
    saes: Sequence[str] = ("*",),
    model: str | None = None,
) -> Bench:
    """The model of a release (its first, unless named), and those of its SAEs whose names fit a pattern.

    Raises:
        StoreError: there is no such release.
        ModelError: the model's files are not those that the release was made with.
        SAEError: an SAE's weights are not on this machine, or no name fits.
    """
    settings = load_settings() if settings is None else settings
    info = current(settings, release)
    with closing(open_release(info.path)) as con:
        row = overview.find_model(overview.models(cursor(con)), model)
        given = _given_name(cursor(con), row.model)
        digest = _rows(con, "SELECT digest FROM models WHERE model = ?", [row.model])[0][0]
        known = _rows(con, "SELECT sae, digest FROM saes WHERE model = ? ORDER BY sae", [row.model])
    loaded = load_model(ModelConfig(given, row.processing), prepare_torch(settings))
    if digest != loaded.files.digest:
        raise ModelError(f"model {row.model!r} here has other weights than the one of release {info.label!r}")
    wanted = [(name, d) for name, d in known if any(fnmatchcase(name, one) for one in saes)]
    if not wanted:
        raise SAEError(
            f"no SAE of release {info.label!r} is called {', '.join(map(repr, saes))}; "
            f"it holds {', '.join(name for name, _ in known) or 'none'}"
        )
    return Bench(loaded, {name: _load(settings, name, d, loaded) for name, d in wanted}, info)


def _given_name(con: Any, model: str) -> str:
    """What the build called the model: a local folder is more than its name."""
    config = overview.readable(overview.provenance(con).get("config", ""))
    given = config.get("model", {}) if isinstance(config, dict) else {}
    name = str(given.get("name", ""))
    return name if name.rstrip("/").split("/")[-1] == model else model


def _rows(con: Any, text: str, given: list[Any]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = con.execute(text, given).fetchall()
    return found


def _load(settings: Settings, name: str, digest: str, model: LanguageModel) -> SAE:
    sae = find_sae(settings, name)
    if sae.digest() != digest:
        raise SAEError(f"the weights of SAE {name!r} on this machine are not those of the release")
    return sae.to(model.device)


def release_text(release: ReleaseInfo, blocks: int) -> npt.NDArray[np.int64]:
    """Token ids [blocks, context] of the first blocks of a release's text; SAEError if it holds none."""
    with closing(open_release(release.path)) as con:
        found = _rows(con, "SELECT tokens FROM docs WHERE block < ? ORDER BY block", [blocks])
    if not found:
        raise SAEError(f"release {release.label!r} holds no text")
    return np.array([tokens for (tokens,) in found], np.int64)
