"""What Streamlit's login through an identity provider (OpenID Connect) has to be told, from the environment.

Streamlit reads it as ``secrets``; the app hands it over in memory, so that no file with a client secret has
to lie beside the program. Errors name variables, never their values.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from atlas.errors import ConfigError, one_of

VARIABLES = {
    "client_id": "ATLAS_OIDC_CLIENT_ID",
    "client_secret": "ATLAS_OIDC_CLIENT_SECRET",
    "server_metadata_url": "ATLAS_OIDC_METADATA_URL",
    "redirect_uri": "ATLAS_OIDC_REDIRECT_URI",
    "cookie_secret": "ATLAS_COOKIE_SECRET",
}
"""Streamlit's name of each secret and the variable that holds it."""
CALLBACK = "/oauth2callback"
SHORTEST_SECRET = 32


def oidc_secrets(environ: Mapping[str, str]) -> dict[str, Any]:
    """Streamlit's ``[auth]`` section; ConfigError names each variable that is missing or not allowed.

    >>> oidc_secrets({"ATLAS_OIDC_CLIENT_ID": "atlas"})
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: ATLAS_AUTH=oidc needs ATLAS_OIDC_CLIENT_SECRET, ATLAS_OIDC_METADATA_URL, \
ATLAS_OIDC_REDIRECT_URI, ATLAS_COOKIE_SECRET
    """
    missing = [variable for variable in VARIABLES.values() if not environ.get(variable)]
    if missing:
        raise ConfigError(f"ATLAS_AUTH=oidc needs {', '.join(missing)}")
    if find_spec("authlib") is None:
        raise ConfigError("ATLAS_AUTH=oidc needs the package Authlib: pip install 'head-atlas[oidc]'")
    if len(environ["ATLAS_COOKIE_SECRET"]) < SHORTEST_SECRET:
        raise ConfigError(f"ATLAS_COOKIE_SECRET is too short; allowed: {SHORTEST_SECRET} characters or more")
    for variable in ("ATLAS_OIDC_METADATA_URL", "ATLAS_OIDC_REDIRECT_URI"):
        _check_address(variable, environ[variable])
    if urlsplit(environ["ATLAS_OIDC_REDIRECT_URI"]).path != CALLBACK:
        raise ConfigError(f"ATLAS_OIDC_REDIRECT_URI must end in {CALLBACK}, after the app's own address")
    provider_role(environ)
    return {name: environ[variable] for name, variable in VARIABLES.items()}


def _check_address(variable: str, address: str) -> None:
    """https, except on the machine itself: tokens must not cross a network in the clear."""
    parts = urlsplit(address)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise ConfigError(f"{variable} must begin with https:// (http:// only for this machine itself)")


def provider_role(environ: Mapping[str, str]) -> str | None:
    """``ATLAS_OIDC_ROLE``: the role of people whom the provider knows and no admin has added; None = refused.

    Admins are only ever made by `atlas users`.
    """
    role = environ.get("ATLAS_OIDC_ROLE") or None
    one_of("ATLAS_OIDC_ROLE", role, (None, "reader", "annotator"))
    return role


def identity(claims: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    """The name that a provider vouches for: ``ATLAS_OIDC_CLAIM``, without it the verified e-mail.

    An e-mail that the provider has not verified could be anybody's: with some providers, people write it
    themselves. Another claim is taken as it stands; whoever names it knows what it means there.

    >>> identity({"email": "ann@lab.example", "email_verified": True}, {})
    'ann@lab.example'
    >>> identity({"email": "ann@lab.example"}, {}) is None
    True
    """
    claim = environ.get("ATLAS_OIDC_CLAIM") or "email"
    if claim == "email" and claims.get("email_verified") not in (True, "true"):
        return None
    found = claims.get(claim)
    return found if isinstance(found, str) and found else None
