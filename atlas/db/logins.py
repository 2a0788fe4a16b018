"""Logging in with a password: tried slowly, remembered by a random token, ended at once.

The browser keeps the token in a cookie; the database keeps its digest and when it ends. Every question looks
it up, so logging out, a new password, a removed user or a changed role counts everywhere at once.
"""

import hashlib
import secrets
from datetime import timedelta

from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session

from atlas.access import Actor
from atlas.db.models import LoginAttempt, LoginSession, User
from atlas.db.passwords import NOBODY, fits
from atlas.db.session import clock, reading, writing
from atlas.db.users import clean_name
from atlas.errors import AccessError, ConfigError
from atlas.settings import Settings

WINDOW = timedelta(minutes=5)
MOST_BY_NAME, MOST_BY_ADDRESS = 10, 40
"""Failed attempts within the window after which no more are looked at: for one name, from one address."""


class TooManyAttemptsError(AccessError):
    """Too many wrong passwords; the same call may succeed in a few minutes."""


def token_digest(token: str) -> str:
    """What the database knows a token by. It is random and long, so one fast hash is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def log_in(settings: Settings, name: str, password: str, address: str) -> str:
    """Check a password and return the token of a new login, which lasts ``settings.session_hours``.

    Raises TooManyAttemptsError, or AccessError in the same words for a wrong name and a wrong password.
    """
    try:
        name = clean_name(name)
    except ConfigError:
        raise _wrong() from None
    _count_attempt(settings, name, address[:80])
    with reading(settings) as session:
        user = session.get(User, name)
        stored = None if user is None else user.password
    if not fits(password, stored or NOBODY):
        raise _wrong()
    token = secrets.token_urlsafe(32)
    with writing(settings) as session:
        user = session.get(User, name, with_for_update=True)
        if user is None or user.password != stored:  # changed while we looked
            raise _wrong()
        _remember(session, token, name, settings.session_hours)
        mine = (LoginAttempt.name == name, LoginAttempt.address == address[:80])
        session.execute(delete(LoginAttempt).where(*mine))
    return token


def _wrong() -> AccessError:
    return AccessError("the name or the password is wrong")


def _count_attempt(settings: Settings, name: str, address: str) -> None:
    """Note the attempt before it is looked at, so that many at once count as many."""
    with writing(settings) as session:
        if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer at a time anyhow
            session.execute(text("LOCK TABLE login_attempts IN SHARE ROW EXCLUSIVE MODE"))
        now = clock(session)
        session.execute(delete(LoginAttempt).where(LoginAttempt.at < now - WINDOW))
        by_name = _attempts(session, LoginAttempt.name == name)
        by_address = _attempts(session, LoginAttempt.address == address)
        too_many = by_name >= MOST_BY_NAME or by_address >= MOST_BY_ADDRESS
        if not too_many:
            session.add(LoginAttempt(name=name, address=address, at=now))
    if too_many:
        minutes = round(WINDOW.total_seconds() / 60)
        raise TooManyAttemptsError(f"too many attempts to log in; try again in {minutes} minutes")


def _attempts(session: Session, *where: object) -> int:
    return session.scalar(select(func.count()).select_from(LoginAttempt).where(*where)) or 0  # type: ignore[arg-type]


def _remember(session: Session, token: str, name: str, hours: float) -> None:
    now = clock(session)
    session.execute(delete(LoginSession).where(LoginSession.expires_at <= now))
    ends = now + timedelta(hours=hours)
    session.add(LoginSession(token_digest=token_digest(token), name=name, created_at=now, expires_at=ends))


def who(settings: Settings, token: str | None) -> Actor | None:
    """Who holds a token, with the role of this moment; None for a token that ended or never was."""
    if not token:
        return None
    with reading(settings) as session:
        query = (
            select(User)
            .join(LoginSession, LoginSession.name == User.name)
            .where(LoginSession.token_digest == token_digest(token), LoginSession.expires_at > clock(session))
        )
        user = session.scalars(query).one_or_none()
        return None if user is None else Actor(user.name, user.role, known=True)


def log_out(settings: Settings, token: str | None) -> None:
    """End a login; nothing happens for one that has ended."""
    if token:
        with writing(settings) as session:
            where = LoginSession.token_digest == token_digest(token)
            session.execute(delete(LoginSession).where(where))
