"""Kissane and Krzyzanowski's pairs: ``NAME.pt``, a dict of four tensors, and ``NAME_cfg.json``.

    f = relu((z - b_dec) W_enc + b_enc)      z^ = f W_dec + b_dec

z is flattened head-major. They were trained on TransformerLens's processed weights, so z is folded: it
lacks the value biases (``processing`` is folded), and SAEs like these reconstruct a raw z badly.
"""

from collections.abc import Collection
from pathlib import Path

from atlas.interop.foreign import Foreign, Place, renamed
from atlas.interop.reading import maybe_number, maybe_text, maybe_whole, read_json, read_pickle, whole

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
PROCESSED = {"fold_ln": True, "center_writing_weights": True, "fold_value_biases": True}
_ENDING = "_cfg.json"


def places(names: Collection[str]) -> list[Place]:
    """Pairs of this format in a tree of file names, each under its ``.pt``."""
    pairs = ((f"{name.removesuffix(_ENDING)}.pt", name) for name in sorted(names) if name.endswith(_ENDING))
    return [Place(weights, (config, weights)) for weights, config in pairs if weights in names]


def read(weights: Path) -> Foreign:
    """What a pair says.

    Raises:
        SAEError: a file is missing or damaged, would run code, or a tensor is missing or unknown.
    """
    where = f"SAE {str(weights)!r}"
    config = read_json(weights.with_name(weights.name.removesuffix(".pt") + _ENDING))
    head = config.get("head")
    return Foreign(
        format="kissane",
        config=config,
        tensors=renamed(where, read_pickle(weights), {name: name for name in TENSORS}),
        architecture="relu",
        d_in=whole(where, config, "act_size"),
        d_sae=whole(where, config, "dict_size"),
        model=maybe_text(config, "model_name") or maybe_text(config, "model"),
        hook=maybe_text(config, "act_name"),
        head=head if isinstance(head, int) and not isinstance(head, bool) else None,
        loaded_with=PROCESSED,
        l1_coefficient=maybe_number(config, "l1_coeff"),
        tokens_trained=maybe_whole(where, config, "num_tokens") or 0,
        context=maybe_whole(where, config, "seq_len") or 0,
        seed=maybe_whole(where, config, "seed") or 0,
    )
