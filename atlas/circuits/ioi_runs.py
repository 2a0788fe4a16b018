"""Forward passes over IOI prompts: what is measured, and what is replaced where.

    logit difference   logit of IO - logit of S at the end (nats)
    KL                 KL(p_model || p_changed) of the next token at the end (nats)

Replacements are exact: a pass resumes at the first layer that is edited (``atlas.lm.hooks``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.ioi_prompts import Batch, Words, abc, draw_prompts, tokenised
from atlas.errors import ConfigError
from atlas.lm.hooks import Edit, Resume, capture, logits_with
from atlas.lm.load import LanguageModel
from atlas.sites import Site

N_ABC = 16


def logit_difference(logits: Float[Tensor, "n pos d_vocab"], batch: Batch) -> Float[Tensor, " n"]:
    """logits[end, IO] - logits[end, S] of each prompt."""
    row = torch.arange(len(batch), device=logits.device)
    last = logits[row, batch.at["end"]].double()
    return last[row, batch.indirect] - last[row, batch.subject]


def kl_at_end(
    clean: Float[Tensor, "n pos d_vocab"], changed: Float[Tensor, "n pos d_vocab"], batch: Batch
) -> Float[Tensor, " n"]:
    """KL(clean || changed) of the prediction at the end of each prompt."""
    row = torch.arange(len(batch), device=clean.device)
    log_p, log_q = (x[row, batch.at["end"]].double().log_softmax(1) for x in (clean, changed))
    return (log_p.exp() * (log_p - log_q)).sum(1)


def mean_of(values: Float[Tensor, " n"], rows: Int[Tensor, " m"]) -> float:
    """The mean over some prompts."""
    return float(values[rows.to(values.device)].mean())


def always(value: Float[Tensor, "n pos d_in"]) -> Edit:
    """An edit that puts this in, whatever comes."""
    return lambda _: value


class Runs:
    """A model, a batch of prompts, and what the model makes of them as it is."""

    def __init__(self, model: LanguageModel, batch: Batch) -> None:
        self.model, self.batch = model, batch
        layers = range(model.shape.n_layers)
        sites = [Site(kind, n) for n in layers for kind in ("resid_pre", "attn_out", "z")]
        hooks = [f"blocks.{n}.attn.hook_{what}" for n in layers for what in ("pattern", "v", "q", "k")]
        hooks += [f"blocks.{n}.ln1.hook_scale" for n in layers]
        self.x, self.raw = capture(model, batch.tokens, sites, hooks)

    @cached_property
    def logits(self) -> Float[Tensor, "n pos d_vocab"]:
        """Of the model as it is."""
        return logits_with(self.model, self.batch.tokens, {})

    @cached_property
    def clean(self) -> Float[Tensor, " n"]:
        """The logit difference of the model as it is."""
        return logit_difference(self.logits, self.batch)

    def row(self) -> Int[Tensor, " n"]:
        """Numbers of the prompts, on the model's device."""
        return torch.arange(len(self.batch), device=self.model.device)

    def changed(
        self, edits: Mapping[Site, Edit], rows: Int[Tensor, " m"] | None = None
    ) -> Float[Tensor, "m pos d_vocab"]:
        """Logits while the sites are edited, of all prompts or of some."""
        first = min(site.layer for site in edits)
        tokens, resid = self.batch.tokens, self.x[Site("resid_pre", first)]
        if rows is not None:
            tokens, resid = tokens[rows], resid[rows]
        return logits_with(self.model, tokens, edits, Resume(first, resid))

    def difference(
        self, edits: Mapping[Site, Edit], rows: Int[Tensor, " m"] | None = None
    ) -> Float[Tensor, " m"]:
        """The logit difference while the sites are edited."""
        batch = self.batch if rows is None else self.batch.of(rows)
        return logit_difference(self.changed(edits, rows), batch)

    def put(
        self, where: str, vectors: Float[Tensor, "m d_in"], rows: Int[Tensor, " m"] | None = None
    ) -> Edit:
        """An edit that replaces one position of each prompt (or of some) and leaves what else comes."""
        at = self.batch.at[where] if rows is None else self.batch.at[where][rows]

        def edit(x: Float[Tensor, "m pos d_in"]) -> Float[Tensor, "m pos d_in"]:
            out = x.clone()
            out[torch.arange(len(at), device=x.device), at] = vectors
            return out

        return edit

    def take(self, site: Site, where: str) -> Float[Tensor, "n d_in"]:
        """The site's activations at one position of each prompt."""
        return self.x[site][self.row(), self.batch.at[where]]


def abc_means(runs: "Runs", words: Words, sites: Sequence[Site], seed: int = 2) -> dict[Site, Tensor]:
    """Each prompt's sites with the mean over 16 ABC prompts of its template and order, position by position.

    ConfigError where a template's prompts differ in length, so that positions do not mean the same.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for row, prompt in enumerate(runs.batch.prompts):
        groups.setdefault((prompt.template, prompt.order), []).append(row)
    means = {site: runs.x[site].clone() for site in sites}
    for number, ((template, order), rows) in enumerate(groups.items()):
        drawn = draw_prompts(words, 2 * N_ABC, seed + number)
        same = [replace(prompt, template=template) for prompt in drawn if prompt.order == order]
        batch = tokenised(runs.model, abc(same))
        ends = {*batch.at["end"].tolist(), *runs.batch.at["end"][rows].tolist()}
        if len(ends) > 1:
            raise ConfigError(
                f"prompts of template {template} differ in length; a mean by position needs one"
            )
        length = ends.pop() + 1
        for site, x in capture(runs.model, batch.tokens, sites)[0].items():
            means[site][rows, :length] = x[:, :length].mean(0)
    return means


def attention_to(runs: Runs, query: str, key: str) -> Float[Tensor, "layers heads"]:
    """Mean attention of every head from one named position to another."""
    row, at = runs.row(), runs.batch.at
    patterns = (runs.raw[f"blocks.{n}.attn.hook_pattern"] for n in range(runs.model.shape.n_layers))
    return torch.stack([p[row, :, at[query], at[key]].double().mean(0) for p in patterns])


def strongest_heads(scores: Float[Tensor, "layers heads"], layers: range, n: int) -> list[tuple[int, int]]:
    """The n heads of some layers with the largest scores; ties go to the lower layer, then head.

    >>> strongest_heads(torch.tensor([[0.1, 0.5], [0.5, 0.2]]), range(0, 2), 2)
    [(0, 1), (1, 0)]
    """
    heads = [(layer, head) for layer in layers for head in range(scores.shape[1])]
    return sorted(heads, key=lambda at: (-float(scores[at]), at))[:n]
