"""One SAE, as it is used: encode, decode, and its tensors under the field's names.

    pre = (x - b_dec) W_enc + b_enc      f = act(pre)      x^ = f W_dec + b_dec

act is ReLU, or TopK: the k largest pre-activations (ties to the lower index), then ReLU.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.errors import SAEError
from atlas.sae.topk import top_k
from atlas.sites import Site


class Active(NamedTuple):
    """The active features of a batch of tokens, sorted by row and then feature."""

    row: Int[Tensor, " n_active"]
    feature: Int[Tensor, " n_active"]
    value: Float[Tensor, " n_active"]


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


@dataclass(frozen=True)
class SAE:
    """Encoder and decoder of one site."""

    info: SAEInfo
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def __post_init__(self) -> None:
        d_in, d_sae = self.W_enc.shape
        shapes = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        for name, shape in shapes.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise SAEError(f"SAE {self.info.name!r}: {name} has shape {found}; W_enc asks for {shape}")
        for name in ("W_enc", *shapes):
            if not torch.isfinite(getattr(self, name)).all():
                raise SAEError(f"SAE {self.info.name!r}: {name} holds NaN or infinity")

    @property
    def d_in(self) -> int:
        """Length of an activation."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def bias_term(self) -> Float[Tensor, " d_sae"]:
        """What the pre-activation holds beside x . W_enc: b_enc - b_dec . W_enc."""
        return self.b_enc - self.b_dec @ self.W_enc

    def preactivations(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """x W_enc plus the bias term."""
        return torch.addmm(self.bias_term, x, self.W_enc)

    def active(self, x: Float[Tensor, "n d_in"]) -> Active:
        """The features that fire, as (row, feature, value) triples."""
        pre = self.preactivations(x)
        if self.info.k is None:
            row, feature = (pre > 0).nonzero(as_tuple=True)
            return Active(row, feature, pre[row, feature])
        values, index = top_k(pre, self.info.k)
        row, slot = (values > 0).nonzero(as_tuple=True)
        return Active(row, index[row, slot], values[row, slot])

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Feature activations, dense."""
        row, feature, value = self.active(x)
        return x.new_zeros(len(x), self.d_sae).index_put((row, feature), value)

    def decode(self, feature_acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """The reconstruction of dense feature activations."""
        return torch.addmm(self.b_dec, feature_acts, self.W_dec)

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """x^, in the shape of x."""
        return self.decode(self.encode(x.reshape(-1, self.d_in))).reshape(x.shape)

    def to(self, device: torch.device) -> "SAE":
        """The same SAE on another device."""
        return SAE(self.info, *(t.to(device) for t in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)))

    def digest(self) -> str:
        """SHA-256 of the tensors, as float32 in a fixed order."""
        total = hashlib.sha256()
        for tensor in (self.W_enc, self.b_enc, self.W_dec, self.b_dec):
            total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()
