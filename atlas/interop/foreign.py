"""What a foreign file says of an SAE, and how that becomes one of ours, checked.

Readers only translate names. Whatever a file does not say stays None here; ``to_sae`` takes it from the
user or refuses, and never guesses.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas import __version__
from atlas.configs import NORMALISATIONS, PROCESSINGS
from atlas.errors import AtlasError, SAEError, one_of
from atlas.interop.hooks import model_called, processing_at, site_of
from atlas.sae.model import ACTIVATIONS, SAE, SAEInfo
from atlas.sites import Site


class Place(NamedTuple):
    """Where an SAE lies below a folder: its own folder or file, and the files that it takes."""

    at: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """What the user says of an SAE; it overrides what the file says."""

    model: str | None = None
    site: str | None = None
    processing: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Foreign:
    """An SAE as its file describes it, tensors under SAELens's names."""

    format: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    architecture: str
    d_in: int | None = None
    d_sae: int | None = None
    model: str | None = None
    hook: str | None = None
    head: int | None = None
    loaded_with: Mapping[str, Any] = field(default_factory=dict)
    """How the model was loaded, in TransformerLens's words; it decides between raw and folded."""
    processing: str | None = None
    """raw or folded, where the file says so itself."""
    k: int | None = None
    l1_coefficient: float | None = None
    tokens_trained: int = 0
    corpus: str = ""
    context: int = 0
    seed: int = 0
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False


def to_sae(where: str, foreign: Foreign, given: Given, source: str) -> SAE:
    """The SAE, with everything checked.

    Raises:
        SAEError: the model or the site is neither in the file nor given, the architecture or the
            normalisation is not known, or a tensor has the wrong shape, the wrong type or holds NaN.
    """
    one_of(f"{where}: architecture", foreign.architecture, ACTIVATIONS, SAEError)
    one_of(f"{where}: normalize_activations", foreign.normalize_activations, NORMALISATIONS, SAEError)
    site, model = _site(where, foreign, given), given.model or foreign.model
    if model is None:
        raise SAEError(f"{where} does not say which model it belongs to; give it (--model gpt2)")
    if given.processing is not None:
        one_of("processing", given.processing, PROCESSINGS, SAEError)
    tensors = _checked(where, foreign)
    d_sae = tensors["W_enc"].shape[1]
    if ACTIVATIONS[foreign.architecture] == "topk" and not 0 < (foreign.k or 0) <= d_sae:
        raise SAEError(f"{where}: k {foreign.k!r} is not allowed; it must be from 1 to d_sae {d_sae}")
    own_name = f"{model_called(model)}/{site.name}.{foreign.architecture}-{d_sae}-{foreign.format}"
    info = SAEInfo(
        name=_full_name(given.name, model_called(model)) if given.name else own_name,
        model=model_called(model),
        processing=given.processing or foreign.processing or processing_at(where, site, foreign.loaded_with),
        site=site,
        architecture=foreign.architecture,
        k=foreign.k,
        l1_coefficient=foreign.l1_coefficient,
        tokens_trained=foreign.tokens_trained,
        corpus=foreign.corpus,
        context=foreign.context,
        seed=foreign.seed,
        origin=f"imported from {foreign.format}",
        code_version=__version__,
        normalize_activations=foreign.normalize_activations,
        apply_b_dec_to_input=foreign.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=foreign.rescale_acts_by_decoder_norm,
        settings=_settings(foreign, source),
    )
    return SAE(info, **{("b_enc" if n == "b_mag" else n): t.to(torch.float32) for n, t in tensors.items()})


def _full_name(name: str, model: str) -> str:
    return name if "/" in name else f"{model}/{name}"


def _settings(foreign: Foreign, source: str) -> str:
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in foreign.tensors.items()}
    kept = {"format": foreign.format, "source": source, "dtypes": dtypes, "config": foreign.config}
    return json.dumps(kept, sort_keys=True, default=str)


def _site(where: str, foreign: Foreign, given: Given) -> Site:
    try:
        if given.site is not None:
            return Site.parse(given.site)
        if foreign.hook is not None:
            return site_of(where, foreign.hook, foreign.head)
    except SAEError:
        raise
    except AtlasError as error:
        raise SAEError(f"{where}: {error}") from None
    raise SAEError(f"{where} does not say which activations it reads; give the site (--site L05.z)")


def _checked(where: str, foreign: Foreign) -> dict[str, Tensor]:
    """The tensors, finite and of the shapes that W_enc and the config ask for."""
    tensors = foreign.tensors
    if tensors["W_enc"].ndim != 2:
        raise SAEError(f"{where}: the encoder has shape {tuple(tensors['W_enc'].shape)}, not two dimensions")
    d_in, d_sae = foreign.d_in or tensors["W_enc"].shape[0], foreign.d_sae or tensors["W_enc"].shape[1]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in tensors.items():
        shape, found = shapes.get(name, (d_sae,)), tuple(tensor.shape)
        if found != shape:
            raise SAEError(
                f"{where}: {name} has shape {found}, d_in {d_in} and d_sae {d_sae} ask for {shape}"
            )
        if not torch.isfinite(tensor.float()).all():
            raise SAEError(f"{where}: {name} holds NaN or infinity")
    return tensors


def renamed(
    where: str, tensors: Mapping[str, Tensor], names: Mapping[str, str], ignored: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors under our names; SAEError if one is missing, not floating, or unknown.

    An unknown tensor is refused because what it would have done would be lost silently.
    """
    missing = sorted(name for name in names if name not in tensors)
    if missing:
        raise SAEError(f"{where} lacks the tensors {', '.join(missing)}; it has {', '.join(sorted(tensors))}")
    unknown = sorted(name for name in tensors if name not in names and name not in ignored)
    if unknown:
        raise SAEError(f"{where} holds tensors with no known meaning: {', '.join(unknown)}")
    for name in names:
        if not tensors[name].is_floating_point():
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise SAEError(f"{where}: {name} is {dtype}; floating numbers are needed")
    return {ours: tensors[theirs] for theirs, ours in names.items()}


def turned(tensor: Tensor) -> Tensor:
    """A matrix transposed; anything else as it is, for its shape to be refused later."""
    return tensor.T if tensor.ndim == 2 else tensor


def folders_with(names: Collection[str], *files: str) -> list[Place]:
    """Every folder of a tree of files that holds all of these, as places."""
    there, found = set(names), []
    for name in sorted(there):
        path = PurePosixPath(name)
        if path.name == files[0]:
            wanted = tuple(str(path.parent / file) for file in files)
            if there.issuperset(wanted):
                found.append(Place(str(path.parent), wanted))
    return found
