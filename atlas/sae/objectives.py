"""Losses beside the squared error: what the reconstruction does to attention, or to the model's output.

For q (or k) of one head, with the other side as the model computed it, s = q . k / sqrt(d_head) over the
sources up to the query, and s^ the same with the rebuilt side:

    scores    mean over (query >= 1, source) of (s^ - s)^2, each query's mean difference taken out, since
              softmax does not see it
    pattern   mean over queries >= 1 of KL(softmax(s) || softmax(s^)), nats

For any site:

    kl        mean over predictions of KL(p || p^) between the model's logits as they are and with the site
              replaced by its reconstruction, nats

Sources: seed 000 (row A22) asks for the first two; seed 003's agenda, and Braun et al. 2024, for the third.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from atlas.errors import ConfigError
from atlas.lm.hooks import write_site
from atlas.lm.load import LanguageModel
from atlas.sae.patterns import follows_scores
from atlas.sites import OTHER_SIDE, Site


def check_objectives(
    objectives: Iterable[str], sites: Sequence[Site], model: LanguageModel, sample: Int[Tensor, "blocks pos"]
) -> None:
    """Raise ConfigError where an objective makes no sense at a site; ``sample`` shows what patterns are."""
    for objective in dict.fromkeys(objectives):
        if objective not in ("scores", "pattern"):
            continue
        for site in sites:
            if site.kind not in OTHER_SIDE:
                raise ConfigError(f"objective {objective!r} is for q and k; {site.name} is neither")
        for layer in dict.fromkeys(site.layer for site in sites):
            if not follows_scores(model, sample, layer):
                raise ConfigError(
                    f"objective {objective!r} is for patterns that are the softmax of q . k / sqrt(d_head); "
                    f"layer {layer} of {model.name} has others; allowed: mse, kl"
                )


def _causal(n: int, device: torch.device) -> Tensor:
    """[query, source]: which sources a query >= 1 may look at."""
    allowed = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    allowed[0] = False
    return allowed


def _products(kind: str, mine: Tensor, other: Tensor) -> Float[Tensor, "*batch query source"]:
    q, k = (mine, other) if kind == "q" else (other, mine)
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def scores_loss(
    kind: str,
    x: Float[Tensor, "n blocks pos d_head"],
    x_hat: Float[Tensor, "n blocks pos d_head"],
    other: Float[Tensor, "n blocks pos d_head"],
) -> Float[Tensor, " n"]:
    """Squared error of the attention scores, per SAE.

    A key that every source shares changes all scores of a query alike, and costs nothing:

    >>> x, other = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    >>> scores_loss("k", x, x + 1, other).tolist()
    [0.0]
    """
    difference = _products(kind, x_hat - x, other)
    allowed = _causal(x.shape[2], x.device)
    count = allowed.sum(1, keepdim=True).clamp_min(1)
    inside = difference * allowed
    centred = (inside - inside.sum(-1, keepdim=True) / count) * allowed
    return centred.square().sum((1, 2, 3)) / (allowed.sum() * x.shape[1])


def pattern_loss(
    kind: str,
    x: Float[Tensor, "n blocks pos d_head"],
    x_hat: Float[Tensor, "n blocks pos d_head"],
    other: Float[Tensor, "n blocks pos d_head"],
) -> Float[Tensor, " n"]:
    """KL of the attention pattern from the rebuilt one, per SAE.

    >>> x, other = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    >>> pattern_loss("k", x, x + 1, other).tolist()
    [0.0]
    """
    hidden = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).triu(1)
    logs = [
        _products(kind, side, other).masked_fill(hidden, -1e9).log_softmax(-1)[:, :, 1:]
        for side in (x, x_hat)
    ]
    kl = F.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    return kl.mean((1, 2))


@torch.no_grad()
def clean_log_probs(model: LanguageModel, tokens: Int[Tensor, "blocks pos"]) -> Tensor:
    """The model's log probabilities of its predictions, as it is."""
    logits: Tensor = model.bridge(tokens, return_type="logits")
    return logits[:, :-1].float().log_softmax(-1)


def kl_loss(
    model: LanguageModel,
    tokens: Int[Tensor, "blocks pos"],
    clean: Float[Tensor, "blocks predictions d_vocab"],
    sites: Sequence[Site],
    x_hat: Float[Tensor, "n blocks pos d_in"],
) -> Float[Tensor, " n"]:
    """KL of the model's predictions from those with one site replaced, per SAE; gradients reach x_hat."""
    losses = []
    for site, replacement in zip(sites, x_hat, strict=True):

        def replace(value: Tensor, hook: object, site: Site = site, new: Tensor = replacement) -> Tensor:  # noqa: ARG001
            return write_site(value, site, new)

        logits = model.bridge.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=[(site.hook_name, replace)]
        )
        log_q = logits[:, :-1].float().log_softmax(-1)
        kl = F.kl_div(log_q, clean, reduction="none", log_target=True).sum(-1)
        losses.append(kl.mean())
    return torch.stack(losses)
