"""The formats of SAEDashboard, Neuronpedia and HeadVis, written down, and a checker of structures.

A schema is a type, a tuple of allowed schemas, a list of one schema (a list of any length of it), or a dict
of names (all of them there, and no others, but for names that end in ``?``).
"""

from typing import Any

NUMBER = (int, float)
MAYBE_TEXT = (str, type(None))
MAYBE_NUMBER = (int, float, type(None))

ACTIVATION = {
    "bin_min": NUMBER, "bin_max": NUMBER, "bin_contains": NUMBER, "tokens": [str], "values": [float],
    "qualifying_token_index": int, "dfa_values?": [float], "dfa_maxValue?": float, "dfa_targetIndex?": int,
}  # fmt: skip
SHOWN = {
    "neuron_alignment_indices": [int], "neuron_alignment_values": [float], "neuron_alignment_l1": [float],
    "correlated_neurons_indices": [int], "correlated_neurons_pearson": [float],
    "correlated_neurons_l1": [float], "correlated_features_indices": [int],
    "correlated_features_pearson": [float], "correlated_features_l1": [float], "neg_str": [str],
    "neg_values": [float], "pos_str": [str], "pos_values": [float], "frac_nonzero": float,
    "freq_hist_data_bar_values": [float], "freq_hist_data_bar_heights": [int],
    "logits_hist_data_bar_values": [float], "logits_hist_data_bar_heights": [int],
    "decoder_weights_dist": [float], "vector": [float],
}  # fmt: skip
FEATURE = SHOWN | {
    "feature_index": int, "n_prompts_total": int, "n_tokens_in_prompt": int, "dataset": str,
    "activations": [ACTIVATION],
}  # fmt: skip
SAEDASHBOARD = {
    "model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": MAYBE_TEXT, "features": [FEATURE],
}  # fmt: skip

OWNED = {"creatorId": str, "createdAt": str}
NP_FEATURE = SHOWN | OWNED | {
    "modelId": str, "layer": str, "index": str, "sourceSetName": str, "maxActApprox": float,
    "hasVector": bool, "vectorLabel": MAYBE_TEXT, "vectorDefaultSteerStrength": MAYBE_NUMBER,
    "hookName": str, "topkCosSimIndices": [int], "topkCosSimValues": [float],
}  # fmt: skip
NP_ACTIVATION = OWNED | {
    "id": str, "tokens": [str], "index": str, "layer": str, "modelId": str, "maxValue": float,
    "maxValueTokenIndex": int, "minValue": float, "values": [float], "dataSource": str, "dataIndex": str,
    "dfaValues": [float], "dfaTargetIndex": (int, type(None)), "dfaMaxValue": MAYBE_NUMBER, "binMin": float,
    "binMax": float, "binContains": float, "qualifyingTokenIndex": int,
}  # fmt: skip
NP_EXPLANATION = {
    "id": str, "modelId": str, "layer": str, "index": str, "authorId": str, "description": str,
    "typeName": MAYBE_TEXT, "explanationModelName": MAYBE_TEXT, "notes": MAYBE_TEXT, "createdAt": str,
}  # fmt: skip
NP_RELEASE = OWNED | {
    "name": str, "description": str, "creatorName": str, "visibility": str, "isNewUi": bool, "featured": bool,
    "descriptionShort": MAYBE_TEXT, "urls": [str], "creatorEmail": MAYBE_TEXT, "creatorNameShort": MAYBE_TEXT,
    "defaultSourceSetName": MAYBE_TEXT, "defaultSourceId": MAYBE_TEXT, "defaultUmapSourceIds": [str],
}  # fmt: skip
NP_MODEL = OWNED | {
    "id": str, "instruct": bool, "displayNameShort": str, "displayName": str, "tlensId": MAYBE_TEXT,
    "dimension": (int, type(None)), "visibility": str, "inferenceEnabled": bool, "layers": int,
    "neuronsPerLayer": int, "owner": str, "updatedAt": str, "website": MAYBE_TEXT,
}  # fmt: skip
NP_SOURCE_SET = OWNED | {
    "modelId": str, "name": str, "hasDashboards": bool, "visibility": str, "description": str, "type": str,
    "creatorName": str, "urls": [str], "creatorEmail": MAYBE_TEXT, "releaseName": MAYBE_TEXT,
    "defaultRange": int, "defaultShowBreaks": bool, "showDfa": bool, "showCorrelated": bool,
    "showHeadAttribution": bool, "showUmap": bool,
}  # fmt: skip
NP_SOURCE = OWNED | {
    "id": str, "modelId": str, "setName": str, "hasDashboards": bool, "inferenceEnabled": bool,
    "inferenceHosts": [str], "saelensConfig": type(None), "saelensRelease": MAYBE_TEXT,
    "saelensSaeId": MAYBE_TEXT, "hfRepoId": MAYBE_TEXT, "hfFolderId": MAYBE_TEXT, "visibility": str,
    "hasUmap": bool, "hasUmapLogSparsity": bool, "hasUmapClusters": bool, "num_prompts": int,
    "num_tokens_in_prompt": int, "dataset": str, "notes": MAYBE_TEXT,
}  # fmt: skip

BINS = {"bin_edges": [NUMBER], "bin_values": [NUMBER]}
TOKEN_WEIGHT = {"token": str, "weight": float}
HV_HEAD = {
    "sequences": [{
        "sequence_id": int, "interval": int, "tokens": [str], "attention_indices": [int],
        "attention_values": [float], "seq_len": int, "max_activation": float,
    }],
    "qk_distance_histogram": BINS, "top_query_tokens": [TOKEN_WEIGHT], "top_key_tokens": [TOKEN_WEIGHT],
    "histogram": BINS, "statistics": {"n_samples": int, "mean_max_activation": MAYBE_NUMBER},
}  # fmt: skip
HV_METRICS = (
    "self_attention_score", "prev_token_score", "pattern_entropy", "qk_distance", "qk_distance_variance",
    "induction_score",
)  # fmt: skip
HV_CONFIG_KEYS = {
    "model_name", "np_model_id", "dataset_name", "heads", "n_layers", "n_heads", "n_intervals", "metrics",
    "metric_descriptions", "head_data_pattern", "has_umap", "umap_heads", "custom_plots", "custom_tables",
    "statistics_display", "pipeline_config",
}  # fmt: skip
HV_PIPELINE_KEYS = {"model_name", "dataset_name", "n_sequences", "seq_len", "dtype", "attn_implementation"}
"""What HeadVis's loaders require of ``pipeline_config``."""


def problems(value: Any, schema: Any, where: str = "$") -> list[str]:
    """What of ``value`` does not fit the schema, at most a few."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: {type(value).__name__} is no object"]
        required = {name for name in schema if not name.endswith("?")}
        known = {name.rstrip("?"): of for name, of in schema.items()}
        found = [f"{where}: lacks {name}" for name in sorted(required - set(value))]
        found += [f"{where}: has {name}" for name in sorted(set(value) - set(known))]
        for name in set(value) & set(known):
            found += problems(value[name], known[name], f"{where}.{name}")
        return found[:20]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: {type(value).__name__} is no list"]
        found = [p for i, one in enumerate(value) for p in problems(one, schema[0], f"{where}[{i}]")]
        return found[:20]
    kinds = schema if isinstance(schema, tuple) else (schema,)
    # In Python True is an int; in JSON it is none.
    if isinstance(value, bool):
        return [] if bool in kinds else [f"{where}: true or false"]
    return [] if isinstance(value, kinds) else [f"{where}: {value!r} is {type(value).__name__}"]


def parallel(entry: dict[str, Any]) -> list[str]:
    """Lists of a feature that have to be equally long and are not."""
    groups = [
        ["neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"],
        ["correlated_features_indices", "correlated_features_pearson"],
        ["neg_str", "neg_values"], ["pos_str", "pos_values"],
        ["freq_hist_data_bar_values", "freq_hist_data_bar_heights"],
        ["logits_hist_data_bar_values", "logits_hist_data_bar_heights"],
    ]  # fmt: skip
    return [str(names) for names in groups if len({len(entry[name]) for name in names}) != 1]
