"""What Head Atlas adds to a file of another format, so that it reads back as the same SAE."""

from typing import Any

from atlas.configs import PROCESSINGS
from atlas.errors import AtlasError, SAEError, one_of
from atlas.sae.model import SAEInfo
from atlas.sites import Site

KEY = "head_atlas"
_KEPT = ("l1_coefficient", "tokens_trained", "corpus", "context", "seed")


def what_we_say(info: SAEInfo) -> dict[str, Any]:
    """Model, site, processing and training of an SAE, for one key of another format's config."""
    return {
        "name": info.name,
        "model": info.model,
        "processing": info.processing,
        "site": info.site.name,
        "l1_coefficient": info.l1_coefficient,
        "tokens_trained": info.tokens_trained,
        "corpus": info.corpus,
        "context": info.context,
        "seed": info.seed,
    }


def said_by_us(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``Foreign`` that ``what_we_say`` wrote; nothing in a file that we did not write."""
    ours = config.get(KEY)
    if not isinstance(ours, dict):
        return {}
    try:
        site = Site.parse(ours["site"])
        one_of("processing", ours["processing"], PROCESSINGS)
        kept = {key: ours[key] for key in ("model", "processing", *_KEPT)}
    except (KeyError, TypeError, AtlasError) as error:
        raise SAEError(f"{where}: what Head Atlas wrote under {KEY!r} is damaged: {error}") from None
    return kept | {"hook": site.hook_name, "head": site.head}
