"""Tables of studies: experiments about a model and its SAEs, whose rows lie beside releases and not in them.

Declared like the tables of a release (``atlas.tables``). ``study`` names the run; -1 stands for the error
term of an SAE where a feature's number is expected, -2 for its constants.
"""

import pyarrow as pa

from atlas.tables import F64, I16, I32, I64, STR, Column, Table

# One line per column reads better here than the formatter's one line per argument.
# fmt: off
C = Column
_STUDY = C("study", STR, "the run that made the row (see table studies)")
_SAE = C("sae", STR, "the SAE")
_PROMPTS = C("prompts", STR, "ABBA, BABA or all")
_N = C("n", I32, "prompts")
_LAYERS = C("layers", pa.list_(I16), "the layers")
_CLEAN = C("logit_diff_clean", F64, "mean logit of IO minus logit of S, the model as it is", "nats")
_FEATURE = C("feature", I32, "feature of the attention SAE; -1 its error term, -2 constants")

_DECLARED = (
    Table("studies", "study", (
        _STUDY, C("kind", STR, "ioi or paths"), C("model", STR, "the model's name"),
        C("release", STR, "the release whose SAEs were used"), C("created", STR, "UTC, ISO 8601"),
        C("command", STR, "what makes it again"), C("settings", STR, "JSON: everything that was chosen"),
    ), ("study",)),
    Table("ioi_splice", "study x SAE or group of SAEs x prompts: SAEs without error terms in the model", (
        _STUDY, C("part", STR, "the SAE, or the group's name"), _LAYERS, _PROMPTS, _N, _CLEAN,
        C("logit_diff_spliced", F64, "the same with reconstructions", "nats"),
        C("logit_diff_mean", F64, "the same with attn_out at its mean over ABC prompts", "nats"),
        C("kl_spliced", F64, "mean KL(clean || spliced) at the end", "nats"),
        C("kl_mean", F64, "the same of mean ablation", "nats"),
    ), ("study", "part", "prompts")),
    Table("ioi_features", "study x SAE x feature that fires at S2 in any prompt x prompts", (
        _STUDY, _SAE, C("feature", I32, "the feature; -1: the error term"), _PROMPTS, _N,
        C("n_active", I32, "prompts in which it fires at S2"),
        C("activation", F64, "mean activation at S2", nullable=True),
        C("effect", F64, "drop of the mean logit difference when it is zero at S2", "nats"),
        C("path_effect", F64, "the same where only the receivers' values at S2 miss it", "nats",
          nullable=True),
        C("top_head", I16, "the head with the largest DFA at S2, where it fires", nullable=True),
        C("top_head_share", F64, "that head's share of the positive DFA", nullable=True),
    ), ("study", "sae", "feature", "prompts")),
    Table("ioi_heads", "study x role x head: heads that the study goes through", (
        _STUDY, C("role", STR, "receiver (its values at S2 are patched) or mover (its score is split)"),
        C("layer", I16, "layer, from 0"), C("head", I16, "head, from 0"),
        C("attention", F64, "mean attention from the end to S2 (receiver) or to IO (mover)"),
        C("chosen", STR, "named, or by attention"),
    ), ("study", "role", "layer", "head")),
    Table("ioi_noise", "study x experiment x prompts: attn_out at S2 from other prompts", (
        _STUDY, C("experiment", STR, "how the other prompts differ"), _LAYERS, _PROMPTS, _N, _CLEAN,
        C("logit_diff_noised", F64, "the same with attn_out at S2 from the other prompt", "nats"),
        C("logit_diff_zero_position", F64, "the same with it zero at S2", "nats"),
        C("kept_position", F64, "(noised - zero) / (clean - zero)", nullable=True),
        C("logit_diff_zero_all", F64, "the same with it zero at every position", "nats"),
        C("kept_all", F64, "(noised - zero) / (clean - zero), zero at every position", nullable=True),
    ), ("study", "experiment", "prompts")),
    Table("qk_pairs", "study x route x prompts x rank: parts of a mover's score to the second name", (
        _STUDY, C("route", STR, "L5 > L8H6 > L9H9: attention layer, via head, mover head"), _PROMPTS,
        C("rank", I16, "by mean magnitude, from 0"), _SAE, _FEATURE,
        C("key_sae", STR, "the residual SAE of the key side"),
        C("key_feature", I32, "its feature; -1 its error term, -2 constants"),
        C("mean", F64, "mean part of the score"), C("mean_abs", F64, "mean magnitude"),
    ), ("study", "route", "prompts", "rank")),
    Table("qk_explained", "study x route x prompts", (
        _STUDY, C("route", STR, "see qk_pairs"), _PROMPTS, _N,
        C("score", F64, "mean score of the path, all parts"),
        C("score_features", F64, "mean score without constants"), C("n_pairs", I16, "pairs that were taken"),
        C("pairs_explain", F64, "1 - Var(score - pairs) / Var(score), without constants", nullable=True),
        C("errors_explain", F64, "the same of all parts with an error term", nullable=True),
    ), ("study", "route", "prompts")),
    Table("circuit_paths", "study x pair of attention features: one reads what the other wrote", (
        _STUDY, _SAE, C("feature", I32, "the later feature"), C("up_sae", STR, "SAE of an earlier layer"),
        C("up_feature", I32, "the earlier feature"),
        C("n", I64, "times it gave at least the least share of the later one's pre-activation"),
        C("n_seen", I64, "times the later feature was looked at"),
        C("mean_share", F64, "its mean share of the pre-activation, over these n"),
        C("max_share", F64, "the largest share"),
        C("block", I32, "where that was: block of the text"),
        C("position", I16, "position of the later feature", "tokens"),
        C("source", I16, "position of the earlier feature", "tokens"),
        C("head", I16, "head of the later layer that carried most of it"),
    ), ("study", "sae", "feature", "up_sae", "up_feature")),
)
# fmt: on

STUDY_TABLES: dict[str, Table] = {table.name: table for table in _DECLARED}
