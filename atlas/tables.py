"""Every table of a release, declared once: columns, types, units, meaning and order.

The Parquet writer, the release builder, ``atlas schema``, the comments inside DuckDB and the reference
page in ``docs/`` are all made from these declarations. A table's ``key`` is also its sort order and is
unique. ``sae`` is short text such as ``docs-12l/L05.z.topk-768``; indices start at 0.
"""

from dataclasses import dataclass

import pyarrow as pa

from atlas.errors import StoreError, one_of

STR, BOOL = pa.string(), pa.bool_()
I8, I16, I32, I64 = pa.int8(), pa.int16(), pa.int32(), pa.int64()
F32, F64 = pa.float32(), pa.float64()
SOURCES = pa.list_(pa.struct([("head", I16), ("source", I16), ("weight", I16)]))
FULL_WEIGHT = 511
"""A source's contribution is stored in this many steps of the example's largest: 10 bits with the sign."""


@dataclass(frozen=True)
class Column:
    """A column: its name, Arrow type, meaning, unit (empty where it has none), and whether it may be NULL.

    A volatile column (a speed) differs from run to run; it is left out of the digests of releases. Numbers
    are stored rounded to ``decimals``, lists to ``digits`` of their largest value or to ``bits`` of it
    (``atlas.store.shorten``), which lie packed in the release's file (``atlas.store.packing``).
    """

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    nullable: bool = False
    volatile: bool = False
    decimals: int | None = None
    digits: int | None = None
    bits: int | None = None

    @property
    def said(self) -> str:
        """The meaning, and how the numbers are rounded.

        >>> C("fve", F32, "FVE", decimals=5).said, C("l0", F64, "mean").said
        ('FVE; to 5 decimals', 'mean')
        """
        how = {"decimals": self.decimals, "digits of the largest": self.digits}
        said = "".join(f"; to {n} {what}" for what, n in how.items() if n is not None)
        if self.bits is not None:
            said = f"; to {self.bits} bits (1/{1 << self.bits}) of the largest"
        return self.meaning + said


@dataclass(frozen=True)
class Table:
    """A table: what one row is, its columns, and the columns it is sorted by and unique in."""

    name: str
    row: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    row_group: int = 65_536

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, in the declared column order."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    def column(self, name: str) -> Column:
        """The column of a name that is declared."""
        return next(column for column in self.columns if column.name == name)

    @property
    def lasting(self) -> pa.Schema:
        """The schema without volatile columns: what a digest covers."""
        return pa.schema([pa.field(c.name, c.type) for c in self.columns if not c.volatile])


DFA_SHARES = {
    "bos": "that comes from BOS",
    "current": "that comes from the example's own position",
    "previous": "that comes from the position before (BOS left out)",
    "same_token": "that comes from earlier copies of the example's token",
    "after_match": "that comes from positions that follow an earlier copy of the example's token",
}
"""Where a feature's evidence lies: the columns of several tables."""

FAMILY_NAMES = (
    "dead",
    "dense",
    "positional",
    "single_token",
    "bigram",
    "previous_token",
    "duplicate_token",
    "induction",
    "local_context",
    "long_range_context",
)
"""Feature families (rules in ``atlas.store.families``)."""

# One line per column reads better here than the formatter's one line per argument.
# fmt: off
C = Column
_SAE = C("sae", STR, "the SAE, unique in a release")
_FEATURE = C("feature", I32, "index of the feature in its SAE")
_MODEL = C("model", STR, "the model's name")
_LAYER = C("layer", I16, "layer, from 0")
_BLOCK = C("block", I32, "row of the token store (see docs)")
_POSITION = C("position", I16, "position in the block; 0 is BOS", "tokens")
_RANK = C("rank", I16, "order within the group, from 0")
_TOKEN = C("token", I32, "token id (see vocab)")
_PAIR = (C("q_sae", STR, "the SAE on the head's queries"), C("k_sae", STR, "the SAE on its keys"))
_QUALITY = (
    C("l0", F64, "mean number of active features per token"),
    C("mse", F64, "squared error per token and dimension"),
    C("variance_explained", F64, "1 - sum ||x - x^||^2 / sum ||x - mean(x)||^2"),
    C("cosine", F64, "mean cosine of x and x^"), C("l2_ratio", F64, "mean ||x^|| / ||x||"),
    C("ce_clean", F64, "cross-entropy of the model as it is", "nats"),
    C("ce_spliced", F64, "cross-entropy with the site replaced by x^", "nats"),
    C("ce_zero", F64, "cross-entropy with the site set to zero", "nats"),
    C("ce_mean", F64, "cross-entropy with the site set to its mean", "nats"),
    C("ce_recovered", F64, "(ce_zero - ce_spliced) / (ce_zero - ce_clean)"),
    C("ce_recovered_mean", F64, "(ce_mean - ce_spliced) / (ce_mean - ce_clean)"),
    C("kl", F64, "mean KL(p_clean || p_spliced)", "nats"),
    C("alive", I32, "features that fire in the evaluation tokens"),
    C("dead", I32, "features that do not"), C("n_tokens", I64, "evaluated tokens", "tokens"),
)

_DECLARED = (
    Table("models", "model", (
        _MODEL,
        C("processing", STR, "raw, or folded (LayerNorm folded, weights centred, value biases folded)"),
        C("n_layers", I16, "number of layers"), C("n_heads", I16, "attention heads per layer"),
        C("d_model", I32, "width of the residual stream"), C("d_head", I32, "width of one head"),
        C("d_vocab", I32, "size of the vocabulary"), C("n_ctx", I32, "longest context", "tokens"),
        C("source", STR, "bundled, hub, or local folder"),
        C("digest", STR, "SHA-256 of the weights as read"),
    ), ("model",)),
    Table("vocab", "token id", (
        _MODEL, _TOKEN, C("text", STR, "visible form: spaces as ·, newlines as ⏎, BOS by name"),
        C("bytes", pa.binary(), "the token's bytes"),
    ), ("model", "token")),
    Table("docs", "block of the analysed text", (
        C("corpus", STR, "the corpus, as its source is written"), _BLOCK,
        C("tokens", pa.list_(I32), "token ids; position 0 is BOS"),
        C("source", STR, "the document in which the block begins"),
    ), ("block",), 4096),
    Table("saes", "SAE", (
        _SAE, _MODEL, C("site", STR, "z q k v resid_pre attn_out mlp_out"), _LAYER,
        C("head", I16, "the head of a single-head site; NULL for a whole layer", nullable=True),
        C("d_in", I32, "length of an activation"), C("d_sae", I32, "number of features"),
        C("architecture", STR, "topk, batchtopk, matryoshka, relu, jumprelu or gated"),
        C("k", I32, "features kept per token, where the architecture keeps k", nullable=True),
        C("l1_coefficient", F64, "weight of the sparsity penalty, where there is one", nullable=True),
        C("normalize_activations", STR, "none, constant_norm_rescale or layer_norm"),
        C("processing", STR, "raw or folded weights"),
        C("include_bos", BOOL, "whether statistics count position 0"),
        C("tokens_trained", I64, "training tokens", "tokens"), C("corpus", STR, "the training corpus"),
        C("n_tokens", I64, "tokens summarised in this release", "tokens"),
        C("seed", I64, "the SAE's seed"), C("origin", STR, "trained, or imported from where"),
        C("settings", STR, "JSON: every setting of its training, as far as is known"),
        C("digest", STR, "SHA-256 of the SAE's tensors"), C("code_version", STR, "version that made it"),
    ), ("sae",)),
    Table("sae_metrics", "SAE x split", (
        _SAE, C("split", STR, "eval (without position 0) or eval_with_bos"), *_QUALITY,
        C("partner", STR, "q and k: the SAE of the other side that pattern_* use; NULL: that side as the "
          "model computed it", nullable=True),
        C("pattern_kl", F64, "q and k: mean KL(pattern || rebuilt pattern) per query", "nats", nullable=True),
        C("pattern_top1", F64, "q and k: share of queries whose strongest source is the same", nullable=True),
        C("score_correlation", F64, "q and k: Pearson correlation of the attention scores and the rebuilt "
          "ones, each query's mean taken out", nullable=True),
        C("ce_pattern", F64, "q and k: cross-entropy with the head's pattern rebuilt", "nats", nullable=True),
        C("ce_pattern_recovered", F64, "q and k: (ce_zero - ce_pattern) / (ce_zero - ce_clean), ce_zero with "
          "both sides zero where both are rebuilt", nullable=True),
    ), ("sae", "split")),
    Table("sae_stages", "SAE x stage x split, where SAEs were pruned or finetuned", (
        _SAE, C("stage", STR, "trained, pruned or finetuned; all other tables are about the last one"),
        C("split", STR, "eval or eval_with_bos"), *_QUALITY,
    ), ("sae", "stage", "split")),
    Table("pruning", "pruned SAE", (
        _SAE, C("n_features", I32, "features before pruning"),
        C("n_weak", I32, "never fire as strongly as the limit"),
        C("n_short", I32, "decoder row shorter than the limit"),
        C("n_rare", I32, "fire more rarely than the limit"),
        C("n_weak_short", I32, "weak and short"), C("n_weak_rare", I32, "weak and rare"),
        C("n_short_rare", I32, "short and rare"), C("n_all_three", I32, "weak, short and rare"),
        C("n_pruned", I32, "any of the three"),
        C("max_activation_limit", F64, "limit of weak, at inputs of mean squared norm d_in"),
        C("decoder_norm_limit", F64, "limit of short"), C("firing_rate_limit", F64, "limit of rare"),
        C("n_tokens", I64, "tokens over which they were measured", "tokens"),
    ), ("sae",)),
    Table("training_log", "SAE x logged step", (
        _SAE, C("step", I32, "optimiser steps taken"), C("tokens", I64, "tokens seen", "tokens"),
        C("loss", F64, "what the optimiser minimised"), C("mse_loss", F64, "squared error summed over d_in"),
        C("sparsity_loss", F64, "sparsity penalty times its coefficient; 0 where k features are kept"),
        C("aux_loss", F64, "auxiliary term (AuxK, ghost gradients, a gated SAE's gate); 0 for none"),
        C("objective_loss", F64, "term of attention scores, pattern or logits; 0 where there is none"),
        C("l0", F64, "active features per token"),
        C("variance_explained", F64, "of the step's batch"),
        C("dead_fraction", F64, "features silent for the dead window"), C("lr", F64, "learning rate"),
        C("tokens_per_second", F64, "rate of the training step since its start or resumption", "tokens/s",
          nullable=True, volatile=True),
    ), ("sae", "step")),
    Table("training_density", "SAE x logged step x bin of firing rate (log10, 0.25 wide)", (
        _SAE, C("step", I32, "optimiser steps taken"),
        C("low", F32, "lower edge of log10(firing rate); NULL for features that never fired", nullable=True),
        C("bin", I16, "-1: never fired since the last histogram; from 0 at 1e-7"),
        C("n", I32, "features"),
    ), ("sae", "step", "bin")),
    Table("training_watched", "SAE x logged step x watched feature", (
        _SAE, C("step", I32, "optimiser steps taken"), _FEATURE,
        C("max_activation", F32, "strongest activation in the step's batch, in the model's units"),
    ), ("sae", "step", "feature")),
    Table("features", "SAE x feature", (
        _SAE, _FEATURE, C("n_active", I64, "tokens on which it fires", "tokens"),
        C("density", F64, "n_active / evaluated tokens"),
        C("max_activation", F32, "largest activation; 0 if it never fires"),
        C("mean_activation", F32, "mean where active", nullable=True),
        C("quantiles", pa.list_(F32), "activation where active at 0, 10, ... 100 %", nullable=True),
        C("encoder_norm", F32, "norm of its encoder direction"),
        C("decoder_norm", F32, "norm of its decoder direction"),
        C("encoder_decoder_cosine", F32, "cosine between the two"), C("bias", F32, "b_enc, as used"),
        C("alive", BOOL, "fires at least once in the summarised tokens"),
        C("pruned", I8, "why it was pruned, as bits: 1 weak, 2 short decoder row, 4 rare; 0 if it was not"),
        C("top_head", I16, "z: the head of largest decoder share", nullable=True),
        C("top_position", I16, "the position of most of its 2000 strongest tokens", "tokens", nullable=True),
        C("top_position_share", F32, "share of its 2000 strongest tokens at that position", nullable=True),
        C("effective_positions", F32, "inverse Simpson index of the positions of its 2000 strongest "
          "tokens: 1 "
          "if all are at one position", nullable=True),
        C("top_token", I32, "the commonest token among its 200 strongest tokens", nullable=True),
        C("top_token_share", F32, "share of its 200 strongest tokens that are this token", nullable=True),
        C("top_previous_token", I32, "the commonest token before its 200 strongest tokens", nullable=True),
        C("top_previous_share", F32, "share of its 200 strongest tokens that follow this token",
          nullable=True),
        C("top_pair_share", F32, "share of its 200 strongest tokens that have the commonest pair of previous "
          "token and token", nullable=True),
        C("loss_effect", F32, "mean change of the loss if it were ablated where it fires, to first "
          "order: minus "
          "activation times decoder row times gradient of the block's summed loss (0 at its last position, "
          "whose next token is not seen)", "nats", nullable=True),
        C("n_loss", I32, "firing tokens of the sampled text that loss_effect is the mean of", "tokens"),
        C("logit_mean", F32, "mean logit effect", nullable=True),
        C("logit_std", F32, "population standard deviation of the logit effects", nullable=True),
        C("logit_skew", F32, "skewness of the logit effects", nullable=True),
        C("logit_kurtosis", F32, "kurtosis of the logit effects; 3 for a normal", nullable=True),
    ), ("sae", "feature")),
    Table("activation_counts", "SAE x feature x scale (view activation_histogram has a row per bin)", (
        _SAE, _FEATURE,
        C("scale", STR, "linear: 50 equal bins on [0, max]; log: 30 bins of equal ratio on [min, max]"),
        C("low", F32, "lower edge of the first bin"), C("high", F32, "upper edge of the last bin"),
        C("n", pa.list_(I32), "active tokens in each bin; the last is closed", "tokens"),
    ), ("sae", "feature", "scale")),
    Table("position_counts", "SAE x feature that fires (view positions has a row per position)", (
        _SAE, _FEATURE, C("position", pa.list_(I16), "positions where it fires; 0 is BOS", "tokens"),
        C("n_top", pa.list_(I32), "at each, of its 2000 strongest tokens", "tokens"),
        C("n_active", pa.list_(I32), "at each, active tokens", "tokens"),
        C("sum_activation", pa.list_(F32), "at each, summed activation"),
    ), ("sae", "feature"), 8192),
    Table("token_stats", "SAE x feature x role x token (strongest 50 by summed activation)", (
        _SAE, _FEATURE, C("role", STR, "at: the token it fires on; next: the token after it"), _RANK, _TOKEN,
        C("n_active", I32, "firings with this token", "tokens"),
        C("sum_activation", F32, "summed activation"), C("max_activation", F32, "largest activation"),
        C("precision", F32, "share of its firings (next: of those that have a next token) with this token",
          decimals=4),
        C("recall", F32, "share of this token's occurrences, position 0 left out (next: and 1), on which it "
          "fires", decimals=4),
    ), ("sae", "feature", "role", "rank")),
    Table("examples", "SAE x feature x group x rank", (
        _SAE, _FEATURE,
        C("example_group", STR, "top; q0 (weakest tenth of active tokens) to q9 (strongest); "
          "random: drawn from "
          "all active tokens; negative: near misses, the largest pre-activations that did not fire"), _RANK,
        _BLOCK, _POSITION, C("activation", F32, "activation at this position; 0 for a near miss"),
        C("near_miss", F32, "of a near miss, the pre-activation at this position", nullable=True),
        C("active_positions", pa.list_(I16), "every position of the block on which the feature fires"),
        C("active_values", pa.list_(F32), "its activations there", bits=12),
    ), ("sae", "feature", "example_group", "rank"), 8192),
    Table("head_attribution", "z SAE x feature x head", (
        _SAE, _FEATURE, C("head", I16, "head, from 0"),
        C("decoder_share", F32, "||W_dec[f, h]|| / sum over heads", decimals=5),
        C("fve", F32, "Cov(d_h, p) / Var(p) over all tokens, of normalised inputs where the SAE normalises; "
          "sums to 1 over heads", nullable=True, decimals=5),
        C("fve_active", F32, "FVE over the tokens on which the feature fires; NULL below 10", nullable=True,
          decimals=5),
        C("dfa_share", F32, "mean of d_h / p over the top examples with p >= sum of |d_h| / 5, in which the "
          "heads make it fire and do not cancel; NULL without any", nullable=True, decimals=5),
        C("logit_share", F32, "Cov(l_h, l) / Var(l) over the vocabulary, l the logit effects and "
          "l_h the part "
          "that goes through the head; sums to 1 over heads", nullable=True, decimals=5),
        *(C(f"dfa_{name}", F32, f"share of the head's positive DFA over the top examples {meaning}",
          nullable=True, decimals=5)
          for name, meaning in DFA_SHARES.items()),
        C("dfa_distance", F32, "mean distance to the source, weighted by the head's positive DFA "
          "over the top "
          "examples; BOS left out", "tokens", nullable=True),
    ), ("sae", "feature", "head")),
    Table("dfa", "kept example on which a feature of a z or attn_out SAE fires", (
        _SAE, _FEATURE, C("example_group", STR, "as in examples"), _RANK,
        C("by_head", pa.list_(F32), "each head's part of the pre-activation, summed over sources; "
          "of a single "
          "head's SAE that head's alone", bits=12),
        C("bias_term", F32, "b_enc, minus b_dec . W_enc where b_dec is subtracted"),
        C("pre_activation", F32, "sum of by_head before it was rounded, plus bias_term"),
        C("top_head", I16, "head of the largest positive contribution", nullable=True),
        C("top_source", I16, "source position of the largest positive contribution", "tokens", nullable=True),
        C("matched_prefix", I16, "tokens before top_source that repeat those up to the example's "
          "position: 0 if "
          "the token before it is another one than the example's", "tokens"),
        C("unit", F32, "what one unit of a source's weight is"),
        C("sources", SOURCES, "largest contributions by magnitude, to 95 % of the absolute sum or "
          "32, largest "
          "first; weight * unit is the contribution (view dfa_sources)"),
    ), ("sae", "feature", "example_group", "rank"), 8192),
    Table("dfa_summary", "z or attn_out SAE x feature, over its top examples", (
        _SAE, _FEATURE, C("n", I16, "top examples"),
        *(C(name, F32, f"share of the positive DFA {meaning}", nullable=True)
          for name, meaning in DFA_SHARES.items()),
        C("local", F32, "share of the positive DFA from 1 to 8 tokens back, BOS left out", nullable=True),
        C("long_range", F32, "share of the positive DFA from more than 32 tokens back, BOS left out",
          nullable=True),
        C("distance", F32, "mean distance to the source, weighted by positive DFA; BOS left out", "tokens",
          nullable=True),
        C("matched", F32, "share of the top examples whose strongest source follows an earlier copy of the "
          "example's token", nullable=True),
        C("matched_prefix", F32, "mean matched_prefix over those", "tokens", nullable=True),
    ), ("sae", "feature")),
    Table("dfa_distances", "z or attn_out SAE x feature x bin of distance, over its top examples", (
        _SAE, _FEATURE, C("low", I16, "smallest distance to the source; -1: the source is BOS", "tokens"),
        C("high", I16, "largest distance", "tokens"),
        C("share", F32, "share of the positive DFA", decimals=5),
        C("negative", F32, "negative DFA over the positive", decimals=5),
    ), ("sae", "feature", "low")),
    Table("dfa_tokens", "z or attn_out SAE x feature x rank (10): source tokens, over its top examples", (
        _SAE, _FEATURE, _RANK, _TOKEN,
        C("share", F32, "share of the stored positive contributions"),
        C("n", I16, "top examples in which it occurs among the stored sources"),
    ), ("sae", "feature", "rank")),
    Table("logit_effects", "SAE x feature x sign x rank (20)", (
        _SAE, _FEATURE, C("sign", I8, "1: promoted tokens; -1: suppressed tokens"), _RANK, _TOKEN,
        C("value", F32, "logit effect of the decoder direction, centred over the vocabulary", "logits"),
    ), ("sae", "feature", "sign", "rank")),
    Table("head_logit_effects", "z SAE x feature x its 2 heads of largest decoder share x sign x rank (5)", (
        _SAE, _FEATURE, C("head", I16, "head, from 0"), C("sign", I8,
          "1: promoted tokens; -1: suppressed tokens"),
        _RANK, _TOKEN, C("value", F32, "logit effect of the head's slice of the decoder direction", "logits"),
    ), ("sae", "feature", "head", "sign", "rank")),
    Table("logit_histogram", "SAE x feature: 40 equal bins of its logit effects", (
        _SAE, _FEATURE, C("low", F32, "smallest effect", "logits"), C("high", F32, "largest effect",
          "logits"),
        C("n", pa.list_(I32), "tokens of the vocabulary in each bin; the last is closed"),
    ), ("sae", "feature")),
    Table("token_index", "role x token x SAE x feature: what features have to do with a token", (
        C("role", STR, "at: it fires on the token; next: before it (both from token_stats); up, down: it "
          "promotes or suppresses it (logit_effects); from: it reads from it (dfa_tokens)"),
        _TOKEN, _SAE, _FEATURE,
        C("score", F32, "at, next: precision; up, down: size of the logit effect; from: share "
          "of the stored positive DFA, to 4"),
    ), ("role", "token", "sae", "feature")),
    Table("example_places", "top example, in the order of the text", (
        _BLOCK, _POSITION, _SAE, _FEATURE,
    ), ("block", "position", "sae", "feature")),
    Table("neighbours", "SAE x feature x direction x scope x rank (5)", (
        _SAE, _FEATURE, C("direction", STR, "decoder or encoder"),
        C("scope", STR, "within: the same SAE; across: other SAEs whose directions share its space"), _RANK,
        C("other_sae", STR, "the neighbour's SAE"), C("other", I32, "the neighbour"),
        C("cosine", F32, "cosine of the two directions"),
    ), ("sae", "feature", "direction", "scope", "rank")),
    Table("coactivation", "SAE x feature x rank (10)", (
        _SAE, _FEATURE, _RANK, C("other", I32, "a feature of the same SAE that fires together with it"),
        C("n_both", I32, "tokens on which both fire", "tokens"),
        C("jaccard", F32, "n_both / tokens on which either fires"),
        C("pearson", F32, "correlation of the two activations over the tokens counted", nullable=True),
        C("pmi", F32, "log of P(both) / (P(one) P(other))", "nats"),
        C("n_tokens", I64, "tokens counted: the first blocks of the analysed text", "tokens"),
    ), ("sae", "feature", "rank")),
    Table("qk_partners", "q or k SAE x SAE of the head's other side x feature x rank (10)", (
        _SAE, C("other_sae", STR, "SAE of the same head's other side"), _FEATURE, _RANK,
        C("other", I32, "feature of the other side"),
        C("product", F32, "dot product of the decoder rows, unscaled, largest first"),
    ), ("sae", "other_sae", "feature", "rank")),
    Table("qk_products", "q SAE x k SAE of the same head x q feature, up to 4 million products", (
        _SAE, C("other_sae", STR, "the k SAE"), _FEATURE,
        C("products", pa.list_(F32), "dot product with the decoder row of every k feature, in their order"),
    ), ("sae", "other_sae", "feature"), 256),
    Table("qk_heads", "head with a q SAE and a k SAE like it", (
        _MODEL, _LAYER, C("head", I16, "head, from 0"), *_PAIR,
        *(C(f"{side}_{what}", I32, f"{side} {meaning}") for side in "qk" for what, meaning in (
            ("positional", "features with 9/10 of their 2000 strongest tokens at one position, as far as "
             "the text allows"),
            ("covered", "positions that have such a feature"),
        )),
        C("diagonal_share", F64, "of the positional q features with a positional k feature one position "
          "earlier, those whose largest product is with such a one", nullable=True),
        C("diagonal_product", F64, "mean product with k features one position earlier", nullable=True),
        C("other_product", F64, "mean product with those of all other positions", nullable=True),
        C("n_diagonal", I32, "positional q features with a positional k feature one position earlier"),
        *(C(f"{variant}_{what}", F64, meaning.format(said), unit, nullable=True)
          for variant, said in (("original", "the model as it is"), ("rebuilt", "q and k rebuilt"))
          for what, meaning, unit in (
            ("log_prob", "random tokens twice: mean log-probability in the second half, {}", "nats"),
            ("attention", "the same: mean attention to the token that comes next, {}", ""),
        )),
    ), ("model", "layer", "head", "q_sae", "k_sae")),
    Table("qk_targets", "pair of SAEs x k feature that follows one token", (
        *_PAIR, C("target", I16, "number of the target, from 0"),
        C("k_feature", I32, "feature of the k SAE: I follow X"), C("token", I32, "X (see vocab)"),
        C("share", F64, "share of its 200 strongest tokens that follow X"),
        C("q_feature", I32, "the q feature of largest product with it"),
        C("product", F32, "that product of decoder rows, unscaled"),
        C("q_token", I32, "the commonest token among that feature's 200 strongest", nullable=True),
        C("q_share", F64, "their share", nullable=True),
        C("place", I16, "position of the first X in blocks of random tokens twice", "tokens"),
        C("half", I16, "random tokens before they come again", "tokens"),
    ), ("q_sae", "k_sae", "target")),
    Table("qk_curves", "pair of SAEs x target x variant x position of random tokens twice", (
        *_PAIR, C("target", I16, "the target whose token was put in; -1: none"),
        C("variant", STR, "original, rebuilt, ablated, only, scaled or subtracted (see heads-qk.md)"),
        C("position", I16, "the predicted position", "tokens"),
        C("log_prob", F64, "mean log-probability of the right token", "nats", nullable=True),
        C("probability", F64, "its mean probability", nullable=True),
        C("attention", F64, "mean attention of the head, from the position before, to the token that "
          "comes next", nullable=True),
        C("n", I32, "blocks"),
    ), ("q_sae", "k_sae", "target", "variant", "position")),
    Table("qk_prompts", "pair of SAEs x prompt", (
        *_PAIR, C("prompt", I16, "number of the prompt"), C("text", STR, "the prompt"),
        C("tokens", pa.list_(I32), "its tokens, BOS first"),
        C("query", I16, "the last position", "tokens"),
        C("source", I16, "where the head looks most from there, BOS left out", "tokens"),
        C("target", I32, "the token whose probability is followed (see vocab)"),
        C("k_feature", I32, "the k feature at the source without which the score falls most", nullable=True),
        C("score_rebuilt", F64, "rebuilt q . k / sqrt(d_head) of query and source", nullable=True),
        C("pattern_kl", F64, "mean KL(pattern || rebuilt pattern) per query", "nats", nullable=True),
        C("pattern_top1", F64, "share of queries whose strongest source is the same", nullable=True),
        C("score_correlation", F64, "correlation of the scores with the rebuilt ones", nullable=True),
        C("pattern", pa.list_(F32), "attention, query by query: the model's", digits=4),
        C("rebuilt", pa.list_(F32), "the same with q and k rebuilt", digits=4),
    ), ("q_sae", "k_sae", "prompt")),
    Table("qk_outcomes", "pair of SAEs x prompt x variant", (
        *_PAIR, C("prompt", I16, "number of the prompt"),
        C("variant", STR, "original; rebuilt; without, only: the k feature at the source"),
        C("log_prob", F64, "log-probability of the target after the prompt", "nats"),
        C("attention", F64, "the head's attention from query to source"),
    ), ("q_sae", "k_sae", "prompt", "variant")),
    Table("qk_scans", "pair of SAEs x prompt x side x feature that fires there", (
        *_PAIR, C("prompt", I16, "number of the prompt"), C("side", STR, "q: at the query; k: at the source"),
        _FEATURE, C("activation", F32, "its activation there"),
        C("change", F64, "of the rebuilt score, if the feature is removed"),
    ), ("q_sae", "k_sae", "prompt", "side", "feature")),
    Table("qk_feature_pairs", "pair of SAEs x prompt x pair of features, the 20 that add most", (
        *_PAIR, C("prompt", I16, "number of the prompt"), _RANK,
        C("q_feature", I32, "feature of the query"), C("k_feature", I32, "feature of the source"),
        C("product", F64, "dot product of the decoder rows, unscaled and unweighted"),
        C("contribution", F64, "what the two add to the score, largest first"),
    ), ("q_sae", "k_sae", "prompt", "rank")),
    Table("position_products", "q or k SAE x feature", (
        _SAE, _FEATURE,
        C("products", pa.list_(F32), "decoder row . W_pos W_Q (k: W_K), by position of a block"),
        C("centred", pa.list_(F32), "the same with the mean over positions taken out of W_pos"),
    ), ("sae", "feature"), 2048),
    Table("head_summary", "head with a z SAE of its whole layer; only features that fire, but for n_dead", (
        _SAE, _MODEL, _LAYER, C("head", I16, "head, from 0"),
        C("n_features", I32, "features that fire"), C("n_top", I32, "of them, features whose top head it is"),
        C("effective_features", F64, "inverse participation of its decoder shares: (sum s)^2 / sum s^2"),
        C("max_decoder_share", F32, "largest decoder share", nullable=True),
        C("top10_decoder_share", F64, "mean of the 10 largest decoder shares", nullable=True),
        C("top10_fve", F64, "mean of the 10 largest FVE", nullable=True),
        C("top10_dfa_share", F64, "mean of the 10 largest DFA shares", nullable=True),
        C("corr_decoder_fve", F64, "Spearman's rank correlation of decoder share and FVE", nullable=True),
        C("corr_decoder_dfa", F64, "the same of decoder share and DFA share", nullable=True),
        C("corr_fve_dfa", F64, "the same of FVE and DFA share", nullable=True),
        C("distance", F64, "mean DFA distance of its features, weighted by max(FVE, 0)", "tokens",
          nullable=True),
        *(C(name, F64, f"share of the head's positive DFA {meaning}: mean over its features, weighted by "
            "max(FVE, 0)", nullable=True) for name, meaning in DFA_SHARES.items()),
        *(C(f"n_{name}", I32, f"family {name}: features whose top head it is") for name in FAMILY_NAMES),
    ), ("model", "layer", "head", "sae")),
    Table("head_scores", "model x layer x head x score", (
        _MODEL, _LAYER, C("head", I16, "head, from 0"), C("score", STR, "name of the score (see heads.md)"),
        C("value", F64, "the score"), C("n", I64, "destinations, predictions, tokens or pairs counted"),
        C("how", STR, "on text, on random repeats, from the weights, or by the loss"),
    ), ("model", "layer", "head", "score")),
    Table("head_spectra", "model x layer x head x circuit", (
        _MODEL, _LAYER, C("head", I16, "head, from 0"), C("circuit", STR, "OV: W_V W_O; QK: W_Q W_K^T"),
        C("singular_values", pa.list_(F32), "largest first"),
        C("frobenius", F64, "Frobenius norm"), C("spectral", F64, "largest singular value"),
        C("effective_rank", F64, "exponential of the entropy of the singular values' shares"),
        C("eigenvalues_real", pa.list_(F32), "eigenvalues from token to token through the circuit (OV: to "
          "the logits, QK: to the embedding), by magnitude: real parts"),
        C("eigenvalues_imag", pa.list_(F32), "their imaginary parts"),
        C("eigenvalue_share", F64, "sum of real parts over sum of magnitudes"),
    ), ("model", "layer", "head", "circuit")),
    Table("head_prefixes", "model x layer x head x length of a repeated stretch of random tokens", (
        _MODEL, _LAYER, C("head", I16, "head, from 0"), C("prefix", I16, "tokens repeated", "tokens"),
        C("attention", F64, "mean attention from its end to the position after its earlier occurrence"),
        C("dla", F64, "mean direct logit attribution of the head to the token there, at its end", "logits"),
        C("n", I32, "sequences"),
    ), ("model", "layer", "head", "prefix")),
    Table("head_text_prefixes", "model x layer x head x threshold x length of the match", (
        _MODEL, _LAYER, C("head", I16, "head, from 0"),
        C("threshold", F64, "attention above which a (destination, source) pair counts"),
        C("prefix", I16, "tokens up to the destination that repeat those before the source; 10: 10 or more",
          "tokens"),
        C("n", I64, "pairs of the text with such a match"),
        C("n_attended", I64, "pairs of the text above the threshold, source BOS left out"),
    ), ("model", "layer", "head", "threshold", "prefix")),
    Table("head_corruption", "model x layer x head", (
        _MODEL, _LAYER, C("head", I16, "head, from 0"),
        C("n", I32, "pairs of the text whose match of at least 2 tokens was cut to 1"),
        C("before", F64, "mean attention to the source, as the text is", nullable=True),
        C("after", F64, "the same with the match cut to one token", nullable=True),
        C("n_attended", I32, "of the pairs, those with attention above 0.3 before"),
        C("attended_before", F64, "mean attention before, over these", nullable=True),
        C("attended_after", F64, "mean attention after, over these", nullable=True),
    ), ("model", "layer", "head")),
    Table("tasks", "model x task", (
        _MODEL, C("task", STR, "the task's name"),
        C("template", STR, "slots in braces; [[ ]]: what is predicted"),
        C("example", STR, "its first prompt"), C("n_prompts", I32, "prompts"), C("n", I32, "predictions"),
        C("loss", F64, "mean loss of the model as it is", "nats"),
    ), ("model", "task")),
    Table("head_task_effects", "model x layer x head x task x ablation", (
        _MODEL, _LAYER, C("head", I16, "head, from 0"), C("task", STR, "the task's name"),
        C("ablation", STR, "zero, or mean: what the head's output is replaced by"),
        C("effect", F64, "rise of the task's mean loss without the head", "nats"),
        C("standard_error", F64, "of the effect, over prompts", "nats", nullable=True),
    ), ("model", "layer", "head", "task", "ablation")),
)
# fmt: on

TABLES: dict[str, Table] = {table.name: table for table in _DECLARED}


def table(name: str) -> Table:
    """The declaration of a table; StoreError names an unknown one.

    >>> table("docs").key
    ('block',)
    """
    one_of("table", name, TABLES, StoreError)
    return TABLES[name]
