"""The same SAE in fewer words: factors that another format has no name for, moved into the weights.

The function stays the same up to the rounding of float32; sums and products are taken in float64.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.sae.model import SAE


def without_rescale(sae: SAE) -> SAE:
    """Decoder norms multiplied into the encoder and divided out of the decoder.

        W_enc |W_dec|, b_enc |W_dec|, W_dec / |W_dec|      (gated: r_mag + log |W_dec| in place of W_enc)

    Activations stay what they are, for the SAE multiplies them by the norm itself.
    """
    if not sae.info.rescale_acts_by_decoder_norm:
        return sae
    norm = sae.W_dec.double().norm(dim=1)
    changed = {
        "b_enc": sae.b_enc * norm,
        "W_dec": sae.W_dec / norm[:, None].clamp_min(1e-12),
    }
    if sae.r_mag is None:
        changed["W_enc"] = sae.W_enc * norm
    else:
        changed["r_mag"] = sae.r_mag + norm.log()
    info = replace(sae.info, rescale_acts_by_decoder_norm=False)
    return replace(sae, info=info, **_single(changed))


def without_subtraction(sae: SAE) -> SAE:
    """b_dec no longer subtracted from the input: b_enc - b_dec W_enc in place of b_enc."""
    if not sae.info.apply_b_dec_to_input:
        return sae
    offset = sae.b_dec.double() @ sae.W_enc.double()
    if sae.r_mag is None or sae.b_gate is None:
        changed = {"b_enc": sae.b_enc - offset}
    else:
        changed = {"b_enc": sae.b_enc - offset * sae.r_mag.double().exp(), "b_gate": sae.b_gate - offset}
    return replace(sae, info=replace(sae.info, apply_b_dec_to_input=False), **_single(changed))


def _single(tensors: dict[str, Float[Tensor, "..."]]) -> dict[str, Float[Tensor, "..."]]:
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
