"""Who may log in: names, roles and passwords, kept by an admin."""

import unicodedata
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from atlas.access import ROLES, Actor, demand
from atlas.db.models import LoginSession, User
from atlas.db.notes import check_name
from atlas.db.passwords import hash_password
from atlas.db.session import clock, reading, writing
from atlas.errors import ConfigError, ConflictError, one_of
from atlas.settings import Settings


@dataclass(frozen=True)
class UserRow:
    """One user, without the password."""

    name: str
    role: str
    has_password: bool
    created_at: datetime
    changed_at: datetime
    logins: int
    """Browsers that are logged in."""


def clean_name(name: str) -> str:
    """A user's name as it is stored: NFC, printable; ConfigError for one that is not allowed.

    >>> clean_name("ann@lab.example")
    'ann@lab.example'
    """
    name = unicodedata.normalize("NFC", name)
    check_name("annotator", name)
    if not name.isprintable():
        raise ConfigError(f"name {name!r} holds characters that cannot be seen; allowed: printable ones")
    return name


def _found(session: Session, name: str) -> User:
    user = session.get(User, name, with_for_update=True)
    if user is None:
        known = ", ".join(session.scalars(select(User.name).order_by(User.name))) or "nobody yet"
        raise ConfigError(f"user {name!r} does not exist; allowed: {known}")
    return user


def add_user(settings: Settings, name: str, role: str, password: str | None) -> None:
    """Let somebody log in; ``password`` None = only through an identity provider, where NAME is the e-mail.

    Raises ConflictError for a name that is taken, also in other capitals: two that look alike would be taken
    for one another.
    """
    demand("users")
    name = clean_name(name)
    one_of("role", role, ROLES)
    stored = None if password is None else hash_password(password)
    with writing(settings) as session:
        taken = {other.casefold() for other in session.scalars(select(User.name))}
        if name.casefold() in taken:
            raise ConflictError(f"user {name!r} is there already; see: atlas users list")
        now = clock(session)
        session.add(User(name=name, role=role, password=stored, created_at=now, changed_at=now))


def set_password(settings: Settings, name: str, password: str) -> None:
    """Replace a password and end the user's logins: whoever knew the old one is out."""
    demand("users")
    stored = hash_password(password)
    with writing(settings) as session:
        user = _found(session, name)
        user.password, user.changed_at = stored, clock(session)
        session.execute(delete(LoginSession).where(LoginSession.name == name))


def set_role(settings: Settings, name: str, role: str) -> None:
    """Give a user another role; it counts from the next thing they do."""
    demand("users")
    one_of("role", role, ROLES)
    with writing(settings) as session:
        user = _found(session, name)
        user.role, user.changed_at = role, clock(session)


def remove_user(settings: Settings, name: str) -> None:
    """End a user's logins and forget the password. What they wrote stays, under their name."""
    demand("users")
    with writing(settings) as session:
        session.delete(_found(session, name))


def list_users(settings: Settings) -> list[UserRow]:
    """Everybody who may log in, by name."""
    with reading(settings) as session:
        counted = (
            select(LoginSession.name, func.count().label("logins"))
            .where(LoginSession.expires_at > clock(session))
            .group_by(LoginSession.name)
            .subquery()
        )
        query = select(User, func.coalesce(counted.c.logins, 0)).outerjoin(
            counted, counted.c.name == User.name
        )
        return [
            UserRow(user.name, user.role, user.password is not None, user.created_at, user.changed_at, logins)
            for user, logins in session.execute(query.order_by(User.name))
        ]


def find_actor(settings: Settings, name: str) -> Actor | None:
    """The user of this name, in whatever capitals, whom somebody else has identified; None if unknown."""
    with reading(settings) as session:
        for user in session.scalars(select(User)):
            if user.name.casefold() == unicodedata.normalize("NFC", name).casefold():
                return Actor(user.name, user.role, known=True)
    return None
