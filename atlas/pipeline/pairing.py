"""Steps about heads with an SAE on their queries and one like it on their keys."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from atlas.circuits.pairs.naming import Columns, followers
from atlas.circuits.pairs.pair import Pair, make_pair
from atlas.circuits.pairs.prompts import look
from atlas.circuits.pairs.repeats import Repeats, Target
from atlas.circuits.pairs.rows import curve_rows, head_row, prompt_rows, target_rows
from atlas.corpus.tokens import bos_id, load_tokenizer
from atlas.lm.load import LanguageModel
from atlas.pipeline.execute import Context
from atlas.pipeline.inputs import analysed_blocks, the_analysed_text, the_model, the_sae, write_rows
from atlas.pipeline.members import pairs_of

_COLUMNS = (
    "n_active", "top_position", "top_position_share", "top_token", "top_token_share", "top_previous_token",
    "top_previous_share",
)  # fmt: skip
TABLES = ("qk_heads", "qk_targets", "qk_curves", "qk_prompts", "qk_outcomes", "qk_scans", "qk_feature_pairs")
Rows = dict[str, list[dict[str, Any]]]


def pair(context: Context) -> None:
    """Everything that is tried with one pair."""
    model = the_model(context)
    numbers = pairs_of(context.plan.saes)[context.step.item]
    one = make_pair(*(the_sae(context, number).to(model.device) for number in numbers))
    q, k = (_features(context, number) for number in numbers)
    tokenizer = load_tokenizer(context.plan.files.path)
    rows: Rows = {name: [] for name in TABLES}
    _add(rows, _repeats(context, model, one, (q, k), bos_id(tokenizer) or 0))
    _add(rows, _prompts(context, model, one, tokenizer))
    for name, found in rows.items():
        write_rows(context.out, name, found)


def _add(rows: Rows, more: Rows) -> None:
    for name, found in more.items():
        rows[name] += found


def _features(context: Context, number: int) -> Columns:
    """Columns of the SAE's features, in order; NULL is NaN or 0."""
    summary = context.plan.of_kind("summarise")[number].name
    table = pq.read_table(context.input(summary) / "features.parquet", columns=["feature", *_COLUMNS])
    table = table.sort_by("feature")
    return {name: np.nan_to_num(table[name].to_numpy(zero_copy_only=False)) for name in _COLUMNS}


def _repeats(
    context: Context, model: LanguageModel, one: Pair, features: tuple[Columns, Columns], bos: int
) -> Rows:
    config, (q, k) = context.plan.config.qk, features
    n_blocks = analysed_blocks(context, the_analysed_text(context))
    half = min(config.half, (model.shape.n_ctx - 1) // 2)
    found = followers(k, config.targets, bos) if config.repeats else []
    curves = {}
    if config.repeats:
        work = Repeats(model, one, bos=bos, n=config.repeats, half=half, seed=config.seed)
        targets = [Target(follower.feature, follower.token) for follower in found]
        curves = work.curves(targets, config.scale, context.progress)
    return {
        "qk_heads": [{"model": model.name, **head_row(one, q, k, n_blocks, curves, half)}],
        "qk_targets": target_rows(one, found, q, half),
        "qk_curves": curve_rows(one, curves),
    }


def _prompts(context: Context, model: LanguageModel, one: Pair, tokenizer: Any) -> Rows:
    prompts, bos = context.plan.config.qk.prompts, bos_id(tokenizer) or 0
    rows: Rows = {}
    for number, text in enumerate(prompts):
        tokens = [bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        found = prompt_rows(one, number, text, look(model, one, tokens))
        for name, more in found.items():
            rows.setdefault(name, []).extend(more)
        context.progress.update(number + 1, len(prompts), "prompts")
    return rows
