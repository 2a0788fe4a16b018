"""Where a model's files are: bundled in this package, in a local folder, or on the Hugging Face hub.

No torch here: a build plan needs only the digest of the weights.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from atlas.errors import ModelError
from atlas.sites import ModelShape

BUNDLED = Path(__file__).resolve().parent.parent / "resources" / "models"
WEIGHTS = ("*.safetensors", "*.bin")
SMALL_FILES = ("*.json", "*.txt", "*.model")


class ModelFiles(NamedTuple):
    """A model's folder here: short name, absolute path, where it came from, digest of its files."""

    name: str
    path: Path
    source: str
    digest: str


def bundled_models() -> tuple[str, ...]:
    """Names of the models that the package ships.

    >>> "docs-2l" in bundled_models()
    True
    """
    return tuple(sorted(p.name for p in BUNDLED.iterdir() if (p / "config.json").exists()))


def find_model(name: str) -> ModelFiles:
    """The folder that ``name`` means; hub models are downloaded into the Hugging Face cache.

    Raises:
        ModelError: nothing of that name is bundled, on disk, or reachable on the hub, or the folder
            holds no config or weights.
    """
    if name in bundled_models():
        return _checked(name, BUNDLED / name, "bundled")
    path = _place(name)
    if name and path.is_dir():
        return _checked(path.absolute().name, path.absolute(), "local folder")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise ModelError(
            f"model folder {name!r} does not exist; bundled models: {', '.join(bundled_models())}"
        )
    return _checked(name.split("/")[-1], _download(name), "hub")


def _place(name: str) -> Path:
    """The name as a path; ModelError if it cannot be one (too long, an unknown user, no permission)."""
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"model {name[:80]!r} cannot be looked up: {error}") from None
    return path


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
        if not list(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "*.bin"]))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ModelError(
            f"model {name!r} is not bundled ({', '.join(bundled_models())}), not a folder, "
            f"and the hub could not give it: {reason}"
        ) from None
    return path


def _checked(name: str, path: Path, source: str) -> ModelFiles:
    if not (path / "config.json").is_file():
        raise ModelError(f"model folder {str(path)!r} holds no config.json; a Hugging Face folder is needed")
    weights = sorted(f for pattern in WEIGHTS for f in path.glob(pattern))
    if not weights:
        raise ModelError(f"model folder {str(path)!r} holds no weights; allowed: {', '.join(WEIGHTS)}")
    stamp = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in (path / "config.json", *weights))
    return ModelFiles(name, path, source, _digest(stamp))


@lru_cache(maxsize=32)
def _digest(stamp: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 over config and weights; the stamp only saves hashing the same files twice."""
    total = hashlib.sha256()
    for name, _, _ in stamp:
        with Path(name).open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def tokenizer_digest(files: ModelFiles) -> str:
    """SHA-256 of what decides how text becomes tokens."""
    total = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json"):
        path = files.path / name
        if path.exists():
            total.update(name.encode() + path.read_bytes())
    return total.hexdigest()


def read_shape(files: ModelFiles) -> ModelShape:
    """The model's sizes from its config, without torch.

    Raises:
        ModelError: the config is not JSON or misses a size.
    """
    try:
        config = json.loads((files.path / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"config of model {files.name!r} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"config of model {files.name!r} is not a table of keys")
    config = config.get("text_config", config)

    def size(*names: str) -> int:
        for name in names:
            if isinstance(config.get(name), int) and config[name] > 0:
                return int(config[name])
        raise ModelError(f"config of model {files.name!r} gives no size above 0 as {' or '.join(names)}")

    d_model, n_heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head", "num_heads")
    n_kv = config.get("num_key_value_heads") or n_heads
    if n_kv != n_heads:
        raise ModelError(
            f"model {files.name!r} shares {n_kv} key and value heads among {n_heads} heads; "
            "models with as many of them as heads are supported"
        )
    d_head = config.get("head_dim") or d_model // n_heads
    n_layers = size("num_hidden_layers", "n_layer", "num_layers")
    n_ctx = size("max_position_embeddings", "n_positions", "n_ctx")
    return ModelShape(n_layers, n_heads, d_model, int(d_head), size("vocab_size"), n_ctx)
