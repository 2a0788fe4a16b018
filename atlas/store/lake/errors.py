"""Errors of an object store in one line that names its URL and the reason, and no secret."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from atlas.errors import AtlasError, StoreError

_SECRET = re.compile(r"key|secret|token|password|passwd|sas|credential|account|user", re.IGNORECASE)
_FINAL = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_HIDDEN = "***"


class LakeError(StoreError):
    """The object store refused, or what it gave is not what was written."""


class LakeMissingError(LakeError):
    """The object store has nothing under that name."""


class LakeUnreachableError(LakeError):
    """The object store did not answer; the same call may succeed later."""


def shown_url(url: str) -> str:
    """The URL as it may be shown: without user and password, query and fragment.

    >>> shown_url("sftp://me:secret@host/atlas?key=1"), shown_url("s3://bucket/prefix")
    ('sftp://***@host/atlas', 's3://bucket/prefix')
    """
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")
    host = f"{_HIDDEN}@{place[2]}" if place[1] else place[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def secrets_of(url: str, options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> list[str]:
    """What must not be shown: the URL's password, options that are secrets by name, the variables of AWS.

    >>> secrets_of("ftp://me:pw123@host/x", {"client_kwargs": {"aws_secret_access_key": "sk42"}}, {})
    ['pw123', 'sk42']
    """
    env = os.environ if environ is None else environ
    found = [urlsplit(url).password or ""]
    found += _named(options)
    found += [value for name, value in env.items() if name.startswith("AWS_") and _SECRET.search(name)]
    return sorted({text for text in found if len(text) > 2}, key=lambda text: (-len(text), text))


def _named(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _named(value)
        elif isinstance(value, str) and _SECRET.search(name):
            yield value


def options_of(text: str) -> dict[str, Any]:
    """The storage options of a setting that was checked to be a JSON object."""
    return dict(json.loads(text)) if text else {}


class Explainer:
    """Turns whatever a store's library raises into our errors."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url, self._secrets = shown_url(url), secrets_of(url, options)

    def clean(self, text: str) -> str:
        """One line without secrets."""
        line = " ".join(text.split())[:300]
        for secret in self._secrets:
            line = line.replace(secret, _HIDDEN)
        return re.sub(r"//[^/@\s]+@", f"//{_HIDDEN}@", line)

    @contextmanager
    def explain(self, what: str) -> Iterator[None]:
        """Errors in the block become LakeError, or LakeUnreachableError where a later call may succeed.

        The cause is a plain ConnectionError or none, for the original's text may hold secrets.
        """
        try:
            yield
        except AtlasError:
            raise
        except FileNotFoundError as error:
            reason = self.clean(str(error.strerror or error))
            raise LakeMissingError(f"lake {self.url}: cannot {what}: not there ({reason})") from None
        except Exception as error:  # noqa: BLE001 (each store's library raises errors of its own)
            reason = self.clean(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            text = f"lake {self.url}: cannot {what}: {reason}"
            if is_final(error):
                raise LakeError(text) from None
            raise LakeUnreachableError(text) from ConnectionError(reason)


def is_final(error: BaseException) -> bool:
    """Whether the same call would fail again: no permission, no such bucket, no credentials, a full disk.

    >>> is_final(PermissionError("AccessDenied")), is_final(TimeoutError())
    (True, False)
    """
    if isinstance(error, _FINAL):
        return True
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
        return True
    status = http_status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 409, 429)


def http_status(error: BaseException) -> int | None:
    """The status of the answer beneath an error of S3, if there was one."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) else None
    return None
