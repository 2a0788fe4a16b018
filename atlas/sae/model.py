"""One SAE, as it is used: encode, decode, and its tensors under the field's names.

    pre = (x - b_dec) W_enc + b_enc      f = act(pre)      x^ = f W_dec + b_dec

with x normalised first where the SAE says so. act is

    relu       max(pre, 0)
    topk       the k largest pre-activations (ties to the lower index), then ReLU
    jumprelu   pre where pre > threshold, strictly; BatchTopK and Matryoshka SAEs are used like this too
    gated      relu((x - b_dec) W_enc exp(r_mag) + b_enc) where (x - b_dec) W_enc + b_gate > 0

An SAE whose ``apply_b_dec_to_input`` is false leaves out "- b_dec"; one with
``rescale_acts_by_decoder_norm`` multiplies pre-activations by the norm of the feature's decoder row and
divides the row by it. Both occur in other people's files; everything here goes through the directions and
offsets that follow from them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.errors import SAEError
from atlas.sae.normalise import Scale, normalise, scale_of
from atlas.sae.topk import top_k
from atlas.sites import Site

ACTIVATIONS = {
    "relu": "relu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
"""Each architecture and the activation function it is used with once it is trained."""

_NEEDED = {"relu": (), "topk": (), "jumprelu": ("threshold",), "gated": ("b_gate", "r_mag")}


class Active(NamedTuple):
    """The active features of a batch of tokens, sorted by row and then feature."""

    row: Int[Tensor, " n_active"]
    feature: Int[Tensor, " n_active"]
    value: Float[Tensor, " n_active"]

    @classmethod
    def largest(cls, index: Int[Tensor, "n k"], value: Float[Tensor, "n k"]) -> "Active":
        """Of the largest of each row, by feature, those above zero.

        >>> Active.largest(torch.tensor([[3, 4], [0, 2]]), torch.tensor([[1.0, -1.0], [2.0, 0.5]])).feature
        tensor([3, 0, 2])
        """
        fires = value > 0
        if bool(fires.all()):
            row = torch.arange(len(value), device=value.device).repeat_interleave(value.shape[1])
            return cls(row, index.reshape(-1), value.reshape(-1))
        row, slot = fires.nonzero(as_tuple=True)
        return cls(row, index[row, slot], value[row, slot])


@dataclass(frozen=True)
class SAEInfo:
    """What is known of an SAE beside its tensors."""

    name: str
    model: str
    processing: str
    site: Site
    architecture: str
    k: int | None
    l1_coefficient: float | None
    tokens_trained: int
    corpus: str
    context: int
    seed: int
    origin: str
    code_version: str
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    settings: str = "{}"
    """JSON: how it was trained, as far as is known."""


@dataclass(frozen=True)
class SAE:
    """Encoder and decoder of one site; ``b_enc`` of a gated SAE is the published ``b_mag``."""

    info: SAEInfo
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None = None
    b_gate: Float[Tensor, " d_sae"] | None = None
    r_mag: Float[Tensor, " d_sae"] | None = None

    def __post_init__(self) -> None:
        d_in, d_sae = self.W_enc.shape
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("b_enc", "threshold", "b_gate", "r_mag"), (d_sae,)
        )
        shapes |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[name]:
                raise SAEError(
                    f"SAE {self.info.name!r}: {name} has shape {tuple(tensor.shape)}; "
                    f"W_enc asks for {shapes[name]}"
                )
            if not _is_finite(tensor):
                raise SAEError(f"SAE {self.info.name!r}: {name} holds NaN or infinity")
        missing = [name for name in _NEEDED[self.activation] if getattr(self, name) is None]
        if missing:
            raise SAEError(f"SAE {self.info.name!r} is {self.info.architecture} and lacks {missing[0]}")

    @property
    def activation(self) -> str:
        """relu, topk, jumprelu or gated."""
        return ACTIVATIONS[self.info.architecture]

    @property
    def d_in(self) -> int:
        """Length of an activation."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it has, by name."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_gate", "r_mag")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @cached_property
    def _gain(self) -> Float[Tensor, " d_sae"] | None:
        """What multiplies a feature's pre-activation beside W_enc."""
        gain = None if self.r_mag is None else self.r_mag.exp()
        if self.info.rescale_acts_by_decoder_norm:
            norm = self.W_dec.norm(dim=1)
            gain = norm if gain is None else gain * norm
        return gain

    @cached_property
    def encoder_directions(self) -> Float[Tensor, "d_in d_sae"]:
        """W so that the pre-activation (of a gated SAE, its magnitude path) is x W + ``bias_term``."""
        return self.W_enc if self._gain is None else self.W_enc * self._gain

    @cached_property
    def bias_term(self) -> Float[Tensor, " d_sae"]:
        """What the pre-activation holds beside x W: b_enc, minus b_dec W where b_dec is subtracted."""
        bias = self.b_enc
        if self.info.rescale_acts_by_decoder_norm:
            bias = bias * self.W_dec.norm(dim=1)
        return bias - self.b_dec @ self.encoder_directions if self.info.apply_b_dec_to_input else bias

    @cached_property
    def decoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What one unit of a feature adds to the (normalised) reconstruction."""
        if not self.info.rescale_acts_by_decoder_norm:
            return self.W_dec
        return self.W_dec / self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def scale(self, x: Float[Tensor, "n d_in"]) -> Scale | None:
        """How each token is normalised; None for an SAE that reads activations as they are."""
        return scale_of(x, self.info.normalize_activations)

    def preactivations(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """x W plus the bias term, x normalised."""
        return torch.addmm(self.bias_term, normalise(x, self.scale(x)), self.encoder_directions)

    def active(self, x: Float[Tensor, "n d_in"]) -> Active:
        """The features that fire, as (row, feature, value) triples."""
        return self.firing(x, self.preactivations(x))

    def firing(self, x: Float[Tensor, "n d_in"], pre: Float[Tensor, "n d_sae"]) -> Active:
        """The features that fire, given the pre-activations of x."""
        if self.activation == "topk":
            value, index = top_k(pre, min(self.info.k or self.d_sae, self.d_sae))
            return Active.largest(index, value)
        fires = pre > 0
        if self.threshold is not None:
            fires &= pre > self.threshold
        if self.b_gate is not None:
            fires &= self._gate(x, self.b_gate) > 0
        row, feature = fires.nonzero(as_tuple=True)
        return Active(row, feature, pre[row, feature])

    def _gate(self, x: Float[Tensor, "n d_in"], bias: Float[Tensor, " d_sae"]) -> Float[Tensor, "n d_sae"]:
        if self.info.apply_b_dec_to_input:
            bias = bias - self.b_dec @ self.W_enc
        return torch.addmm(bias, normalise(x, self.scale(x)), self.W_enc)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Feature activations, dense."""
        row, feature, value = self.active(x)
        return x.new_zeros(len(x), self.d_sae).index_put((row, feature), value)

    def decode(
        self, feature_acts: Float[Tensor, "n d_sae"], scale: Scale | None = None
    ) -> Float[Tensor, "n d_in"]:
        """The reconstruction of dense feature activations, in the model's scale if ``scale`` is given."""
        out = torch.addmm(self.b_dec, feature_acts, self.decoder_directions)
        return out if scale is None else scale.undo(out)

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """x^, in the shape of x."""
        rows = x.reshape(-1, self.d_in)
        return self.decode(self.encode(rows), self.scale(rows)).reshape(x.shape)

    def to(self, device: torch.device) -> "SAE":
        """The same SAE on a device."""
        if self.W_enc.device == device:
            return self
        return self.with_tensors({name: t.to(device) for name, t in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "SAE":
        """The same SAE with other tensors in place of some."""
        return SAE(self.info, **{**self.tensors(), **tensors})

    def digest(self) -> str:
        """SHA-256 of the tensors, as float32 in a fixed order."""
        total = hashlib.sha256()
        for tensor in self.tensors().values():
            total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()


def _is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; a sum that is finite says so in a tenth of the time."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
