"""Bringing dead features back: AuxK, ghost gradients, resampling.

A feature is dead when it has been silent for ``dead_window`` tokens. Sources: AuxK, Gao et al. 2024,
section A.2; ghost gradients, Jermyn and Templeton 2024; resampling, Bricken et al. 2023; seed 003, D6.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atlas.configs import SAEConfig
from atlas.sae.forward import Forward, Params
from atlas.sae.sparse import Pattern, selected_preactivations, sparse_decode
from atlas.sae.topk import top_k

ENCODER_SHARE = 0.2
"""Resampled encoder directions get this share of the mean norm of the living ones."""


def revival_loss(
    p: Params,
    x: Float[Tensor, "n batch d_in"],
    out: Forward,
    dead: Bool[Tensor, "n d_sae"],
    config: SAEConfig,
) -> Float[Tensor, " n"]:
    """The auxiliary loss of each SAE; zero for one that has no dead feature."""
    kind = config.revival
    if kind not in ("auxk", "ghost") or not dead.any():
        return x.new_zeros(len(x))
    error = (x - out.x_hat).detach()
    losses = []
    for s in range(len(x)):
        numbers = dead[s].nonzero().squeeze(1)
        if len(numbers) == 0:
            losses.append(x.new_zeros(()))
        elif kind == "auxk":
            losses.append(_auxk(p, out.centred[s], out, s, numbers, error[s], config))
        else:
            losses.append(_ghost(p, out.centred[s], out.bias[s], s, numbers, error[s]))
    return torch.stack(losses)


def _auxk(
    p: Params,
    x: Float[Tensor, "batch d_in"],
    out: Forward,
    s: int,
    numbers: Int[Tensor, " n_dead"],
    error: Float[Tensor, "batch d_in"],
    config: SAEConfig,
) -> Float[Tensor, ""]:
    """The dead features of largest pre-activation explain what the living ones leave."""
    k = min(config.aux_k, len(numbers))
    if k == 0 or config.aux_coefficient == 0:
        return x.new_zeros(())
    W_enc, W_dec = p["W_enc"][s], p["W_dec"][s]
    selected, index = top_k(out.pre[s][:, numbers], k)
    pattern = Pattern.fixed(numbers[index], len(W_enc))
    values = selected_preactivations(x, W_enc, out.bias[s], selected.reshape(-1), pattern).relu()
    rest = error - sparse_decode(values, W_dec, pattern)
    return config.aux_coefficient * rest.square().sum(1).mean()


def _ghost(
    p: Params,
    x: Float[Tensor, "batch d_in"],
    bias: Float[Tensor, " d_sae"],
    s: int,
    numbers: Int[Tensor, " n_dead"],
    error: Float[Tensor, "batch d_in"],
) -> Float[Tensor, ""]:
    """Dead features with exp in place of ReLU explain half of the error; as large as the squared error."""
    # Beyond e^10 the direction is all that counts, since the output is rescaled; this keeps it finite.
    f = torch.addmm(bias[numbers], x, p["W_enc"][s][numbers].T).clamp_max(10.0).exp()
    ghost = f @ p["W_dec"][s][numbers]
    size = error.norm(dim=1, keepdim=True) / (2 * ghost.detach().norm(dim=1, keepdim=True) + 1e-8)
    loss = (error - ghost * size).square().sum(1).mean()
    return loss * (error.square().sum(1).mean() / (loss.detach() + 1e-8))


@torch.no_grad()
def resample(
    p: Params,
    s: int,
    dead: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "n d_in"],
    error: Float[Tensor, "n d_in"],
    seed: int,
) -> None:
    """Point each dead feature of SAE ``s`` at a token that is badly reconstructed.

    Tokens are drawn with probability proportional to the square of their squared error. The decoder row
    becomes the unit vector towards the token (from b_dec), the encoder row the same at a fifth of the mean
    norm of the living encoder rows, the bias 0.
    """
    numbers = dead.nonzero().squeeze(1)
    if len(numbers) == 0:
        return
    weight = error.square().sum(1).double().square().cpu()
    if weight.sum() <= 0:
        return
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(weight, len(numbers), replacement=True, generator=generator).to(x.device)
    direction = x[drawn] - p["b_dec"][s]
    direction /= direction.norm(dim=1, keepdim=True).clamp_min(1e-8)
    alive = ~dead
    norm = p["W_enc"][s][alive].norm(dim=1).mean() if alive.any() else x.new_ones(())
    p["W_dec"][s, numbers] = direction
    p["W_enc"][s, numbers] = direction * norm * ENCODER_SHARE
    for name in ("b_enc", "b_gate", "r_mag"):
        if name in p:
            p[name][s, numbers] = 0.0
    if "log_threshold" in p and alive.any():
        p["log_threshold"][s, numbers] = p["log_threshold"][s][alive].mean()
