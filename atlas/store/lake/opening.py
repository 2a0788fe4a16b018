"""How a URL becomes a file system: fsspec, with time-outs and without its cache of listings."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

import fsspec
from fsspec.core import url_to_fs

from atlas.errors import ConfigError
from atlas.settings import Settings
from atlas.store.lake.errors import Explainer, options_of, shown_url

Objects: TypeAlias = Any
"""An fsspec file system; fsspec has no types."""
_S3_DEFAULTS: dict[str, Any] = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}
}


def open_objects(url: str, options: dict[str, Any]) -> tuple[Objects, str, str]:
    """The file system behind a URL, the path in it, and its kind: s3, folder or other.

    Raises ConfigError where the protocol is not known, its package is missing or an option is not.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    options |= {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options = _S3_DEFAULTS | options
    if protocol in ("file", "local"):
        options |= {"auto_mkdir": True}
    try:
        fs, root = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        known = ", ".join(sorted(fsspec.available_protocols())[:40])
        what = "needs a package" if isinstance(error, ImportError) else "cannot be used"
        reason = Explainer(url, options).clean(str(error))
        raise ConfigError(
            f"ATLAS_LAKE_URL {shown_url(url)} {what}: {reason} (s3:// needs head-atlas[s3]); known: {known}"
        ) from None
    except TypeError as error:
        raise ConfigError(
            f"ATLAS_LAKE_OPTIONS do not fit {shown_url(url)}: {Explainer(url, options).clean(str(error))}"
        ) from None
    kinds = {"s3": "s3", "s3a": "s3", "file": "folder", "local": "folder"}
    return fs, str(root).rstrip("/"), kinds.get(protocol, "other")


def changed_at(info: Mapping[str, Any]) -> float:
    """When an object was written, by whatever name its store has for it; 0 where it does not say."""
    for name in ("LastModified", "mtime", "created", "last_modified", "updated"):
        value = info.get(name)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def lake_url_of(settings: Settings) -> tuple[str, dict[str, Any]]:
    """URL and storage options of the lake; ConfigError when none is set."""
    if settings.lake_url is None:
        raise ConfigError("ATLAS_LAKE_URL is not set; allowed: s3://BUCKET/PREFIX, another URL, or /FOLDER")
    return settings.lake_url, options_of(settings.lake_options)
