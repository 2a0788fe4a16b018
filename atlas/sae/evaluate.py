"""How good is each SAE on held-out text, as a reconstruction and inside the model?"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.corpus.tokens import TokenStore
from atlas.lm.hooks import Resume, logits_with
from atlas.lm.layers import read_sites
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import batch_of
from atlas.progress import Progress
from atlas.sae.metrics import ReconstructionSums, cross_entropy_sum, kl_sum, predictions, recovered
from atlas.sae.model import SAE
from atlas.sae.patterns import SIDES, PatternSums, follows_scores, partners
from atlas.sites import Site

BATCH_TOKENS = 4096
SPLITS = ("eval", "eval_with_bos")
_MOST_LOGITS = 2**27
_MOST_ACTS = 2**26
Vectors = Mapping[Site, Float[Tensor, "batch pos d_in"]]


@torch.no_grad()
def evaluate(
    model: LanguageModel, saes: Sequence[SAE], store: TokenStore, blocks: int, progress: Progress
) -> list[dict[str, Any]]:
    """Rows of ``sae_metrics``: two per SAE, without and with position 0.

    The cross-entropies run over all predictions and splice every position; they are the same in both
    rows, with the mean of ce_mean taken over the tokens without position 0. Pattern metrics are those of
    queries from position 1 on, in both rows.
    """
    step = batch_of(min(BATCH_TOKENS, _MOST_LOGITS // model.shape.d_vocab) // store.meta.context)
    batches = [
        torch.from_numpy(store.blocks(range(i, min(i + step, blocks)))).to(model.device)
        for i in range(0, blocks, step)
    ]
    work = _Evaluation(model, saes, batches[0][:1] if batches else None)
    done, total = 0, len(batches) * (len(work.sites) + len(saes))
    for tokens in batches:
        inside = _Batch(model, tokens, work.needed)
        work.clean(inside)
        for place, members in work.places.items():
            work.place(inside, members)
            done += len(members)
            progress.update(done, total, f"splicing {place}")
    for tokens in batches:
        inside = _Batch(model, tokens, work.stream)
        for site in work.sites:
            work.mean(inside, site)
            done += 1
            progress.update(done, total, f"mean of {site.name}")
    return [work.row(sae, split) for sae in saes for split in SPLITS]


class _Batch:
    """Some blocks, what the model holds at the sites, and passes that resume at the edited layer."""

    def __init__(self, model: LanguageModel, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]) -> None:
        self.model, self.tokens = model, tokens
        self.x: Vectors = read_sites(model, tokens, sites)

    @cached_property
    def clean(self) -> Float[Tensor, "batch next d_vocab"]:
        """Predictions of the model as it is."""
        return self.spliced({}, max(site.layer for site in self.x))

    def spliced(
        self, values: Mapping[Site, Float[Tensor, "batch pos d_in"]], layer: int
    ) -> Float[Tensor, "batch next d_vocab"]:
        """Predictions with these vectors in place of the sites', all of them in one layer."""
        edits = {site: (lambda _, value=value: value) for site, value in values.items()}
        resume = Resume(layer, self.x[Site("resid_pre", layer)])
        return predictions(logits_with(self.model, self.tokens, edits, resume))

    def ce(self, values: Mapping[Site, Float[Tensor, "batch pos d_in"]], layer: int) -> float:
        """Summed cross-entropy of the same."""
        return cross_entropy_sum(self.spliced(values, layer), self.tokens)


class _Pair(NamedTuple):
    """The SAEs that rebuild one head's pattern, by name."""

    q: str | None
    k: str | None


class _Evaluation:
    """Sums of everything that rows are made from; ablations are summed by site, not by SAE."""

    def __init__(
        self, model: LanguageModel, saes: Sequence[SAE], sample: Int[Tensor, "one pos"] | None
    ) -> None:
        self.model = model
        self.sites = tuple(dict.fromkeys(sae.info.site for sae in saes))
        layers = sorted({site.layer for site in self.sites})
        self.stream = tuple(Site("resid_pre", layer) for layer in layers)
        sided = sorted({site.layer for site in self.sites if site.kind in SIDES})
        self.plain = {n for n in sided if sample is not None and follows_scores(model, sample, n)}
        both = (Site(kind, s.layer, s.head) for s in self.sites if self._has_pattern(s) for kind in SIDES)
        self.needed = tuple(dict.fromkeys((*self.sites, *self.stream, *both)))
        self.places: defaultdict[str, list[SAE]] = defaultdict(list)
        for sae in saes:
            site = sae.info.site
            self.places[site.name.rsplit(".", 1)[0] if self._has_pattern(site) else site.name].append(sae)
        self.partner = partners([sae for sae in saes if self._has_pattern(sae.info.site)])
        self.rest = {sae.info.name: ReconstructionSums(sae.d_in, sae.d_sae) for sae in saes}
        self.bos = {sae.info.name: ReconstructionSums(sae.d_in, sae.d_sae) for sae in saes}
        self.patterns: defaultdict[_Pair, PatternSums] = defaultdict(PatternSums)
        self.ce: defaultdict[tuple[str, object], float] = defaultdict(float)
        self.n = 0

    def _has_pattern(self, site: Site) -> bool:
        return site.kind in SIDES and site.layer in self.plain

    def _zero_key(self, site: Site) -> Site:
        """Queries of zero and keys of zero give the same, even pattern: they are one ablation."""
        return Site("q", site.layer, site.head) if self._has_pattern(site) else site

    def _mean_key(self, site: Site) -> tuple[str, object]:
        """One key at every position gives that even pattern too, so that its ablation is known already."""
        if site.kind == "k" and self._has_pattern(site):
            return "zero", self._zero_key(site)
        return "mean", site

    def clean(self, inside: _Batch) -> None:
        """The model as it is."""
        self.ce["clean", None] += cross_entropy_sum(inside.clean, inside.tokens)
        self.n += inside.tokens.numel() - len(inside.tokens)

    def place(self, inside: _Batch, members: Sequence[SAE]) -> None:
        """Everything about the SAEs of one place: one site, or q and k of one head."""
        rebuilt: dict[str, Tensor] = {}
        for sae in members:
            site, name = sae.info.site, sae.info.name
            x_hat = self._read(sae, inside.x[site])
            log_q = inside.spliced({site: x_hat}, site.layer)
            self.ce["spliced", name] += cross_entropy_sum(log_q, inside.tokens)
            self.ce["kl", name] += kl_sum(inside.clean, log_q)
            if self._has_pattern(site):
                rebuilt[name] = x_hat
        for site in dict.fromkeys(self._zero_key(sae.info.site) for sae in members):
            zero = torch.zeros_like(inside.x[site])
            self.ce["zero", site] += inside.ce({site: zero}, site.layer)
        if rebuilt:
            for pair in dict.fromkeys(self._pair(sae) for sae in members):
                self._pattern(inside, members[0].info.site, pair, rebuilt)

    def _read(self, sae: SAE, whole: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """Encode and decode once, add to the sums of position 0 and of the rest; x^ comes back."""
        x, context = whole.reshape(-1, sae.d_in), whole.shape[1]
        at_bos, at_rest, x_hat = [], [], []
        first = 0
        for part in torch.split(x, max(1, _MOST_ACTS // sae.d_sae)):
            active = sae.active(part)
            dense = part.new_zeros(len(part), sae.d_sae).index_put((active.row, active.feature), active.value)
            x_hat.append(sae.decode(dense, sae.scale(part)))
            is_bos = (active.row + first) % context == 0
            at_bos.append(active.feature[is_bos])
            at_rest.append(active.feature[~is_bos])
            first += len(part)
        rebuilt = torch.cat(x_hat).reshape(whole.shape)
        flat = (-1, sae.d_in)
        rest = whole[:, 1:].reshape(flat), rebuilt[:, 1:].reshape(flat)
        self.rest[sae.info.name].update(*rest, torch.cat(at_rest))
        self.bos[sae.info.name].update(whole[:, 0], rebuilt[:, 0], torch.cat(at_bos))
        return rebuilt

    def _pair(self, sae: SAE) -> _Pair:
        names = (sae.info.name, self.partner[sae.info.name])
        return _Pair(*names) if sae.info.site.kind == "q" else _Pair(*names[::-1])

    def _pattern(self, inside: _Batch, where: Site, pair: _Pair, rebuilt: Mapping[str, Tensor]) -> None:
        sites = [Site(kind, where.layer, where.head) for kind in SIDES]
        true = [inside.x[site] for site in sites]
        hats = [x if n is None else rebuilt[n] for n, x in zip(pair, true, strict=True)]
        self.patterns[pair].update(*true, *hats)
        if None not in pair:
            self.ce["pattern", pair] += inside.ce(dict(zip(sites, hats, strict=True)), where.layer)

    def mean(self, inside: _Batch, site: Site) -> None:
        """The site replaced by its mean over the evaluated tokens."""
        key = self._mean_key(site)
        if key != ("mean", site):
            return
        name = next(sae.info.name for m in self.places.values() for sae in m if sae.info.site == site)
        mean = (self.rest[name].total / max(self.rest[name].n, 1)).float().to(self.model.device)
        self.ce[key] += inside.ce({site: mean.expand(*inside.tokens.shape, -1)}, site.layer)

    def row(self, sae: SAE, split: str) -> dict[str, Any]:
        """One row of ``sae_metrics``."""
        name, site = sae.info.name, sae.info.site
        sums = self.rest[name] if split == "eval" else self.rest[name].merge(self.bos[name])
        keys = {"clean": ("clean", None), "spliced": ("spliced", name), "mean": self._mean_key(site)}
        keys["zero"] = ("zero", self._zero_key(site))
        ce = {f"ce_{what}": self.ce[key] / self.n for what, key in keys.items()}
        row = {"sae": name, "split": split, **sums.metrics(), **ce, "kl": self.ce["kl", name] / self.n}
        row["ce_recovered"] = recovered(ce["ce_clean"], ce["ce_spliced"], ce["ce_zero"])
        row["ce_recovered_mean"] = recovered(ce["ce_clean"], ce["ce_spliced"], ce["ce_mean"])
        row["n_tokens"] = sums.n
        return row | self._pattern_columns(sae, ce) if self._has_pattern(site) else row

    def _pattern_columns(self, sae: SAE, ce: Mapping[str, float]) -> dict[str, Any]:
        pair = self._pair(sae)
        rebuilt = ce["ce_spliced"] if None in pair else self.ce["pattern", pair] / self.n
        return {
            "partner": self.partner[sae.info.name],
            **self.patterns[pair].metrics(),
            "ce_pattern": rebuilt,
            "ce_pattern_recovered": recovered(ce["ce_clean"], rebuilt, ce["ce_zero"]),
        }
