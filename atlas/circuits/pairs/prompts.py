"""One prompt through a pair: where the head looks, rebuilt or not, and which features decide it.

The query is the last token; the source is where the head looks most from there, BOS left out. What is
predicted is the token at the source if it follows an earlier copy of the last one (induction), else the
model's own choice.
Source: seed 000, rows A9, A10, A11, A13 and A17.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.circuits.edits import Edit, ablate
from atlas.circuits.pairs.pair import Pair, Run, run
from atlas.circuits.pairs.scan import Scan, scan
from atlas.errors import ConfigError
from atlas.lm.load import LanguageModel
from atlas.sae.patterns import PatternSums, follows_scores


class Outcome(NamedTuple):
    """The prediction at the query under a variant, and the head's attention to the source."""

    log_prob: float
    attention: float


class PromptResult(NamedTuple):
    """Everything about one prompt."""

    tokens: tuple[int, ...]
    query: int
    source: int
    target: int
    """The token whose probability is followed."""
    k_feature: int | None
    """The key feature at the source without which the score falls most; None where none fires."""
    pattern: Float[Tensor, "query key"]
    rebuilt: Float[Tensor, "query key"]
    metrics: dict[str, float]
    """pattern_kl, pattern_top1 and score_correlation of this prompt (see ``sae.patterns``)."""
    scan: Scan | None
    """None for a head whose scores are more than q . k / sqrt(d_head) (rotary positions, a cap)."""
    outcomes: dict[str, Outcome]
    """By variant: original, rebuilt; without the key feature at the source; with only this one there."""


def look(model: LanguageModel, pair: Pair, tokens: Sequence[int]) -> PromptResult:
    """Run a prompt (BOS first) through a pair; ConfigError for one that is too short or too long."""
    if not 3 <= len(tokens) <= model.shape.n_ctx:
        raise ConfigError(
            f"a prompt of {len(tokens)} tokens with BOS is not allowed; allowed: 3 to {model.shape.n_ctx}"
        )
    row = torch.tensor([list(tokens)], device=model.device)
    original, rebuilt = run(model, row, pair, rebuilt=False), run(model, row, pair)
    query = len(tokens) - 1
    source = 1 + int(original.pattern[0, query, 1:].argmax())
    copied = 0 < source < query and tokens[source - 1] == tokens[query]
    target = tokens[source] if copied else int(original.logits[0, query].argmax())
    plain = follows_scores(model, row, pair.layer)
    found = scan(pair, rebuilt, query, source) if plain else None
    feature = _decisive(pair, rebuilt, source, found)
    seen = {"original": original, "rebuilt": rebuilt}
    if feature is not None:
        for name, edit in _edits(pair, feature, source).items():
            seen[name] = run(model, row, pair, [edit])
    return PromptResult(
        tuple(tokens), query, source, target, feature, original.pattern[0], rebuilt.pattern[0],
        _metrics(pair, rebuilt) if plain else {}, found,
        {name: _outcome(one, query, source, target) for name, one in seen.items()},
    )  # fmt: skip


def _edits(pair: Pair, feature: int, source: int) -> dict[str, Edit]:
    others = [other for other in range(pair.k.d_sae) if other != feature]
    name = pair.k.info.name
    return {"without": ablate(name, feature, source), "only": ablate(name, others, source)}


def _decisive(pair: Pair, seen: Run, source: int, found: Scan | None) -> int | None:
    """The key feature whose removal costs the score most; where scores do not split, the strongest one."""
    if found is not None:
        if not len(found.k.feature):
            return None
        return int(found.k.feature[int(found.without_k.argmin())])
    acts = seen.splice.acts[pair.k.info.name][0, source] if seen.splice else torch.zeros(1)
    return int(acts.argmax()) if bool((acts > 0).any()) else None


def _metrics(pair: Pair, seen: Run) -> dict[str, float]:
    if seen.splice is None:
        return {}
    x = [seen.splice.x[sae.info.name] for sae in pair]
    hats = [
        one - seen.splice.errors[sae.info.name] for one, sae in zip(x, pair, strict=True)
    ]  # x^ = x - error
    sums = PatternSums()
    sums.update(x[0], x[1], hats[0], hats[1])
    return sums.metrics()


def _outcome(seen: Run, query: int, source: int, target: int) -> Outcome:
    log_prob = seen.logits[0, query].double().log_softmax(-1)[target]
    return Outcome(float(log_prob), float(seen.pattern[0, query, source]))
