"""Does a head still look where it looked, with its queries and keys rebuilt by SAEs?

    score[query, source] = q[query] . k[source] / sqrt(d_head), source <= query      pattern = softmax

For a head whose pattern is more than that (rotary positions, another scale, a cap, a window) a site's
vectors do not say what its pattern is, and there are no pattern metrics.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE
from atlas.sites import partner, partner_name

SIDES = ("q", "k")
_MOST_PAIRS = 2**22


@dataclass
class PatternSums:
    """Float64 sums from which the pattern metrics of one head follow.

    Queries are all positions from 1 on (position 0 has one source to look at); sources include BOS.
    """

    n: int = 0
    same: int = 0
    kl: float = 0.0
    product: float = 0.0
    square: float = 0.0
    square_hat: float = 0.0

    def update(
        self,
        q: Float[Tensor, "batch pos d_head"],
        k: Float[Tensor, "batch pos d_head"],
        q_hat: Float[Tensor, "batch pos d_head"],
        k_hat: Float[Tensor, "batch pos d_head"],
    ) -> None:
        """Add a batch: queries and keys as the model computed them, and as rebuilt."""
        rows = max(1, _MOST_PAIRS // q.shape[1] ** 2)
        for part in zip(*(torch.split(t, rows) for t in (q, k, q_hat, k_hat)), strict=True):
            self._add(scores(part[0], part[1]), scores(part[2], part[3]))

    def _add(self, true: Float[Tensor, "batch pos pos"], hat: Float[Tensor, "batch pos pos"]) -> None:
        allowed = causal(true)
        log_p, log_q = (s.masked_fill(~allowed, -math.inf).log_softmax(-1) for s in (true, hat))
        kl = (log_p.exp() * (log_p - log_q)).masked_fill(~allowed, 0).sum(-1)
        self.kl += kl[:, 1:].sum().item()
        self.same += int((strongest(true)[:, 1:] == strongest(hat)[:, 1:]).sum())
        self.n += kl[:, 1:].numel()
        a, b = centred(true), centred(hat)
        self.product += (a * b).sum().item()
        self.square += a.square().sum().item()
        self.square_hat += b.square().sum().item()

    def merge(self, other: "PatternSums") -> "PatternSums":
        """The sums of both samples together."""
        names = ("n", "same", "kl", "product", "square", "square_hat")
        return PatternSums(*(getattr(self, name) + getattr(other, name) for name in names))

    def metrics(self) -> dict[str, float]:
        """pattern_kl, pattern_top1 and score_correlation of everything added so far; NaN where undefined.

        Mean KL(pattern || rebuilt pattern) per query in nats; the share of queries whose strongest source
        (the lower of equal ones) is the same; the Pearson correlation of the scores with the rebuilt ones
        over all (query, source <= query), each query's mean taken out of both, since softmax ignores it.

        >>> sums, k = PatternSums(), torch.tensor([[[0.0], [math.log(3.0)]]])
        >>> sums.update(torch.ones(1, 2, 1), k, torch.ones(1, 2, 1), -k)  # (1/4, 3/4) becomes (3/4, 1/4)
        >>> m = sums.metrics()
        >>> round(m["pattern_kl"], 6), round(0.25 * math.log(1 / 3) + 0.75 * math.log(3), 6)
        (0.549306, 0.549306)
        >>> m["pattern_top1"], round(m["score_correlation"], 6)
        (0.0, -1.0)
        """
        size = math.sqrt(self.square * self.square_hat)
        return {
            "pattern_kl": self.kl / self.n if self.n else math.nan,
            "pattern_top1": self.same / self.n if self.n else math.nan,
            "score_correlation": self.product / size if size > 0 else math.nan,
        }


def scores(
    q: Float[Tensor, "batch pos d_head"], k: Float[Tensor, "batch pos d_head"]
) -> Float[Tensor, "batch pos pos"]:
    """Attention scores of one head, in float64 and before the mask."""
    return q.double() @ k.double().transpose(1, 2) / math.sqrt(q.shape[2])


def causal(of: Float[Tensor, "batch pos pos"]) -> Bool[Tensor, "pos pos"]:
    """Which sources each query may look at."""
    return torch.ones(of.shape[1:], dtype=torch.bool, device=of.device).tril()


def strongest(of: Float[Tensor, "batch pos pos"]) -> Int[Tensor, "batch pos"]:
    """Each query's source of the highest score; ties go to the lower index.

    >>> strongest(torch.tensor([[[5.0, 9.0], [2.0, 2.0]]])).tolist()
    [[0, 0]]
    """
    masked = of.masked_fill(~causal(of), -math.inf)
    index = torch.arange(of.shape[2], device=of.device).expand_as(of)
    return index.masked_fill(masked < masked.amax(-1, keepdim=True), of.shape[2]).amin(-1)


def centred(of: Float[Tensor, "batch pos pos"]) -> Float[Tensor, "batch pos pos"]:
    """Scores without each query's mean over its sources; 0 where a query may not look.

    >>> centred(torch.tensor([[[5.0, 9.0], [1.0, 3.0]]])).tolist()
    [[[0.0, 0.0], [-1.0, 1.0]]]
    """
    allowed = causal(of)
    kept = of.masked_fill(~allowed, 0)
    return (kept - kept.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True)).masked_fill(~allowed, 0)


def partners(saes: Sequence[SAE]) -> dict[str, str | None]:
    """For each q or k SAE, the SAE of the other side that is rebuilt with it, or None.

    The other side's SAE at the same layer and head has the same architecture and the same name but for
    the letter of its side.
    """
    by_name = {sae.info.name: sae for sae in saes}
    found: dict[str, str | None] = {}
    for sae in saes:
        site = sae.info.site
        if site.kind not in SIDES:
            continue
        name = partner_name(sae.info.name, site)
        other = by_name.get(name)
        matches = (
            other is not None
            and other.info.site == partner(site)
            and other.info.architecture == sae.info.architecture
        )
        found[sae.info.name] = name if matches else None
    return found


@torch.no_grad()
def follows_scores(model: LanguageModel, tokens: Int[Tensor, "batch pos"], layer: int) -> bool:
    """Whether the layer's patterns are the causal softmax of q . k / sqrt(d_head), seen on ``tokens``."""
    names = [f"blocks.{layer}.attn.hook_{what}" for what in ("q", "k", "pattern")]
    _, raw = capture(model, tokens, (), names)
    q, k, pattern = (raw[name] for name in names)
    if q.shape != k.shape or pattern.shape[1] != q.shape[2]:
        return False
    for head in range(q.shape[2]):
        own = scores(q[:, :, head], k[:, :, head])
        expected = own.masked_fill(~causal(own), -math.inf).softmax(-1)
        if not torch.allclose(pattern[:, head].double(), expected, rtol=0, atol=1e-4):
            return False
    return True
