"""What will each step of a plan cost, before it runs: tokens of text, FLOPs of products, bytes on disk.

FLOPs count a multiplication and an addition as two, in dense products and in those with the active features
of a token; sorting, counting and writing are not counted, so steps that only do these (publish) have none.
Bytes are those of the output that stays. Numbers of active features are guesses (``FIRING``) where the
architecture does not fix them. tests/test_pipeline_estimates.py compares both with what a build really did.
"""

import time
from collections.abc import Callable

from atlas.errors import StoreError
from atlas.lm.sizes import ModelSizes, read_sizes
from atlas.pipeline.costs import Cost, Width, widths
from atlas.pipeline.plan import Plan, Step
from atlas.pipeline.wiring import text_ranges
from atlas.settings import Settings
from atlas.sites import Site

EXAMPLES = 80
"""Examples kept of a feature that fires often enough: 75 firing ones and 5 near misses."""
ACT_BYTES, SUMMARY_BYTES, DFA_BYTES, SHARE_BYTES, RELEASE_BYTES = 8, 5_000, 150, 12_000, 15_500
"""Bytes of one activation in a shard; of a feature in summaries; of an example's DFA; of a feature in the
tables of shares; of a feature in a release. Measured on z SAEs of twelve heads (benchmarks/store.py)."""
HARVEST_BLOCKS, VARIANTS, PAIR_BYTES = 16, 6, 60_000
REPEAT_TOKENS, KINDS_OF_PROMPTS, PROMPT_TOKENS = 121, 4, 40


class Estimator:
    """Costs of a plan's steps."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.plan, self.config = plan, plan.config
        self.model: ModelSizes = read_sizes(plan.files)
        self.saes = widths(plan, settings)
        self.context = plan.config.corpus.context
        self.in_text = 1 - 1 / self.context
        """Share of tokens that SAEs see: position 0 is left out."""
        self.formulas: dict[str, Callable[[Step], Cost]] = {
            "tokens": self.tokens,
            "train": self.train,
            "imports": lambda _: Cost(bytes=sum(s.bytes for s in self._of_step("imports"))),
            "prune": self.prune,
            "finetune": self.finetune,
            "evaluate": self.evaluate,
            "heads": self.heads,
            "shard": self.shard,
            "effects": self.effects,
            "summarise": self.summarise,
            "dfa": self.dfa,
            "pair": self.pair,
            "attribute": self.attribute,
            "reference": lambda _: Cost(bytes=50 * self.model.d_vocab),
            "publish": lambda _: Cost(bytes=RELEASE_BYTES * sum(s.d_sae for s in self.saes)),
        }

    def cost(self, step: Step) -> Cost:
        """The cost of a step; all None for a kind without a formula."""
        formula = self.formulas.get(step.kind)
        return Cost(None, None, None) if formula is None else formula(step)

    def _of_step(self, name: str) -> list[Width]:
        pairs = zip(self.plan.saes, self.saes, strict=True)
        return [width for member, width in pairs if member.step == name]

    def _capture(self, n_tokens: float, sites: list[Site]) -> float:
        """A forward pass that ends in the layer of the last site: q, k, v and z come before its MLP.

        A z site's layer costs its q, k, v and its attention, about half of the weights outside the MLP.
        """
        if not sites:
            return 0.0
        last = max(sites, key=lambda s: (s.layer, s.kind in ("attn_out", "mlp_out")))
        model, whole = self.model, float(last.layer)
        d_attn = model.d_attn
        part = {"resid_pre": 0, "mlp_out": model.per_layer, "attn_out": 4 * model.d_model * d_attn}
        weights = part.get(last.kind, 3 * model.d_model * d_attn)
        square = 0 if last.kind in ("resid_pre", "q", "k", "v") else 4 * self.context * d_attn
        return model.forward(n_tokens, self.context, layers=whole, logits=False) + n_tokens * (
            2 * weights + square
        )

    def _stream(self, tokens: int) -> tuple[int, int]:
        """Tokens that are trained on where so many are asked for, and those that the model reads for them.

        Chunks are whole, are cut from whole blocks without their position 0, and the model always sees 16
        blocks at once.
        """
        train = self.config.train
        chunk = train.batch * train.chunk_batches
        chunks = -(-tokens // chunk)
        blocks = chunks * -(-chunk // (self.context - 1))
        return chunks * chunk, -(-blocks // HARVEST_BLOCKS) * HARVEST_BLOCKS * self.context

    def _analysed(self, item: int) -> int:
        return len(self.plan.shard_blocks(item)) * self.context

    def tokens(self, step: Step) -> Cost:
        """Text to tokens of 2 bytes, or 4 where the vocabulary has more than 65,536."""
        n = len(text_ranges(self.config)[step.item]) * self.context
        return Cost(n, 0.0, n * (2 if self.model.d_vocab <= 1 << 16 else 4))

    def train(self, step: Step) -> Cost:
        """One forward pass up to the last site, and the training of every SAE of the part."""
        saes, (n, read) = self._of_step(step.name), self._stream(self.config.train.tokens)
        flops = self._capture(read, list(self.plan.parts[step.item]))
        flops += n * sum(sae.training for sae in saes)
        return Cost(n, flops, sum(sae.bytes for sae in saes))

    def prune(self, step: Step) -> Cost:  # noqa: ARG002
        """A forward pass and every SAE's pre-activations."""
        config = self.config.prune
        n, read = self._stream(config.tokens if config else 0)
        flops = self._capture(read, [s.site for s in self.saes]) + n * sum(s.encode for s in self.saes)
        return Cost(n, flops, sum(s.bytes for s in self.saes))

    def finetune(self, step: Step) -> Cost:  # noqa: ARG002
        """A forward pass, pre-activations, and decoders with their gradients for active features."""
        config = self.config.finetune
        n, read = self._stream(config.tokens if config else 0)
        each = sum(s.encode + 3 * s.decode for s in self.saes)
        flops = self._capture(read, [s.site for s in self.saes]) + n * each
        return Cost(n, flops, sum(s.bytes for s in self.saes))

    def evaluate(self, step: Step) -> Cost:  # noqa: ARG002
        """Per stage: the model as it is, with each SAE spliced in, and with each site ablated twice.

        Passes that edit a layer begin there.
        """
        n = self.config.evaluation.blocks * self.context
        sites = list(dict.fromkeys(s.site for s in self.saes))
        flops = self.model.forward(n, self.context) + 2 * self._capture(n, sites)
        flops += sum(self._from(n, s.site) + n * (s.encode + s.decode) for s in self.saes)
        flops += 2 * sum(self._from(n, site) for site in sites)
        stages = len(self.plan.stages)
        return Cost(n * stages, flops * stages, 2_000 + 600 * len(self.saes) * stages)

    def _from(self, n_tokens: float, site: Site) -> float:
        """The rest of a forward pass, from a site's layer to the logits."""
        return self.model.forward(n_tokens, self.context, layers=self.model.n_layers - site.layer)

    def heads(self, step: Step) -> Cost:  # noqa: ARG002
        """Patterns over held-out text and repeats; the loss without each head on text and prompts.

        An ablated pass begins at the head's layer: half of the layers on average.
        """
        asked, n_heads = self.config.heads, self.plan.shape.n_heads * self.plan.shape.n_layers
        text = self.config.evaluation.blocks * self.context
        repeats = 5 * asked.repeats * REPEAT_TOKENS
        prompts = asked.prompts * KINDS_OF_PROMPTS * PROMPT_TOKENS
        ablated = min(asked.ablation_blocks, self.config.evaluation.blocks) * self.context + prompts
        half = self.model.n_layers / 2 + 0.5
        flops = self.model.forward(text + repeats, self.context, logits=False)
        flops += n_heads * self.model.forward(ablated, self.context, layers=half)
        return Cost(text, flops, 20_000 + 300 * n_heads)

    def shard(self, step: Step) -> Cost:
        """A forward pass up to the last site, pre-activations, and a covariance (2 d_in^2) per site of z."""
        n = self._analysed(step.item)
        square = sum(2 * s.d_in**2 for s in {s.site: s for s in self.saes if _of_layer(s)}.values())
        each = square + sum(s.encode for s in self.saes)
        kept = round(n * self.in_text) * sum(s.active for s in self.saes) * ACT_BYTES
        flops = self._capture(n, [s.site for s in self.saes]) + n * self.in_text * each
        return Cost(n, flops, kept + 4 * square + 40 * sum(s.d_sae for s in self.saes))

    def effects(self, step: Step) -> Cost:  # noqa: ARG002
        """Forward, backward from the logits to the first site, and the firing features' products."""
        blocks = min(self.config.analysis.loss_blocks, self.config.analysis.blocks)
        n = blocks * self.context
        first = min((s.site for s in self.saes), key=lambda site: site.layer)
        flops = self.model.forward(n, self.context) + self._from(n, first)
        flops += n * sum(s.encode + s.decode for s in self.saes)
        return Cost(n, flops, 16 * sum(s.d_sae for s in self.saes))

    def summarise(self, step: Step) -> Cost:
        """Directions times the unembedding, as a whole and for two heads, and comparisons with other SAEs."""
        sae, model = self.saes[step.item], self.model
        flops = 0.0
        if sae.site.kind not in ("q", "k"):
            flops = 2.0 * model.d_vocab * model.d_model**2
            flops += 3.0 * model.d_vocab * model.d_model * sae.d_sae
        others = sum(s.d_sae for s in self.saes if (s.site.kind in "qk") == (sae.site.kind in "qk"))
        flops += 2.0 * model.d_model * sae.d_sae * (others + sae.d_sae + sae.d_in)
        return Cost(0, flops, SUMMARY_BYTES * sae.d_sae)

    def dfa(self, step: Step) -> Cost:
        """A forward pass over the shard's text, and 2 context d_in per kept example.

        Where the corpus pass kept the residual stream, a third of that pass is enough.
        """
        reading = [s for s in self.saes if s.site.kind in ("z", "attn_out")]
        n = self._analysed(step.item)
        share = len(self.plan.shard_blocks(step.item)) / self.config.analysis.blocks
        kept = share * EXAMPLES * sum(s.d_sae for s in reading)
        each = share * EXAMPLES * sum(s.d_sae * 2 * self.context * s.d_in for s in reading)
        flops = self._capture(n, [s.site for s in reading]) + each
        return Cost(n, flops, round(kept * DFA_BYTES))

    def pair(self, step: Step) -> Cost:  # noqa: ARG002
        """Passes over blocks of repeats: two, and six for each feature that is tried."""
        asked, n_ctx = self.config.qk, self.plan.shape.n_ctx
        n = asked.repeats * (2 * min(asked.half, (n_ctx - 1) // 2) + 1)
        passes = 2 + VARIANTS * asked.targets
        return Cost(n * passes, passes * self.model.forward(n, self.context), PAIR_BYTES)

    def attribute(self, step: Step) -> Cost:
        """Shares of heads from the covariance: 4 d_in^2 per feature."""
        sae = self.saes[step.item]
        return Cost(0, 4.0 * sae.d_in**2 * sae.d_sae, SHARE_BYTES * sae.d_sae)


def _of_layer(sae: Width) -> bool:
    return sae.site.kind == "z" and sae.site.head is None


def estimate(plan: Plan, settings: Settings) -> dict[str, Cost]:
    """The cost of every step of a plan, by name."""
    estimator = Estimator(plan, settings)
    return {step.name: estimator.cost(step) for step in plan.steps}


def measured_flops_per_second(settings: Settings, seconds: float = 0.5) -> float:
    """FLOPs per second of float32 matrix products of 1,024 x 1,024 on the device that steps would use."""
    import torch

    from atlas.lm.runtime import prepare_torch

    device = prepare_torch(settings)
    a = torch.randn(1024, 1024, device=device)
    n, started = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - started < seconds:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first product also loads libraries; it is left out of the time.
        if n == 0:
            started = time.perf_counter()
        n += 1
    spent = time.perf_counter() - started
    if spent <= 0:
        raise StoreError("the speed of this machine could not be measured; give it: --flops RATE")
    return 2.0 * 1024**3 * (n - 1) / spent
