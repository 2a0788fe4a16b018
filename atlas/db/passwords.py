"""Passwords as they are stored: salted and slow to guess, with the cost written beside them.

scrypt (RFC 7914) with N = 2^15, r = 8, p = 3 needs 32 MB and a third of a second for one guess, one of the
settings that the OWASP password storage cheat sheet names. The cost is part of the stored text, so that it
can be raised later: older passwords are still checked with their own cost.
"""

import base64
import hashlib
import hmac
import re
import secrets
import threading

from atlas.errors import ConfigError

N, R, P = 2**15, 8, 3
SHORTEST, LONGEST = 10, 200
_FORM = re.compile(r"scrypt\$(\d+)\$(\d+)\$(\d+)\$([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+)")
_AT_ONCE = threading.BoundedSemaphore(2)
"""So many checks run at the same time in a process: each takes 32 MB, and everybody may ask for one."""
NOBODY = f"scrypt${N}${R}${P}${base64.b64encode(bytes(16)).decode()}${base64.b64encode(bytes(32)).decode()}"
"""No password fits it; checked for unknown names, so that the time does not tell which names exist."""


def check_password(password: str) -> None:
    """ConfigError, which never repeats it, unless a new password has an allowed length."""
    if not SHORTEST <= len(password) <= LONGEST:
        raise ConfigError(f"password has {len(password)} characters; allowed: {SHORTEST} to {LONGEST}")


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    with _AT_ONCE:
        return hashlib.scrypt(
            password.encode(), salt=salt, n=n, r=r, p=p, maxmem=128 * n * r * 2 + 2**20, dklen=32
        )


def hash_password(password: str, *, n: int = N) -> str:
    """A new password as it is stored: ``scrypt$N$r$p$salt$digest``, salt and digest in base 64."""
    check_password(password)
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, n, R, P)
    return f"scrypt${n}${R}${P}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def fits(password: str, stored: str) -> bool:
    """Whether a password is the stored one, compared in a time that does not depend on how much is right.

    >>> fits("correct horse", hash_password("correct horse", n=16)), fits("wrong horse", NOBODY)
    (True, False)
    """
    parts = _FORM.fullmatch(stored)
    if parts is None or len(password) > LONGEST:
        return False
    n, r, p = (int(parts[i]) for i in (1, 2, 3))
    salt, digest = base64.b64decode(parts[4]), base64.b64decode(parts[5])
    return hmac.compare_digest(_scrypt(password, salt, n, r, p), digest)
