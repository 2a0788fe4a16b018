"""Who is using the app: looked up from the browser's login at every question; the page that asks for one."""

import os

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from app import state, style
from atlas import access
from atlas.access import Actor
from atlas.db import logins, users
from atlas.errors import AccessError, ConfigError
from atlas.oidc import identity, provider_role
from atlas.settings import Settings, load_settings

COOKIE = "atlas_session"
LOGIN = "/login"
READ_ONLY = "Your role is reader: you see everything and write nothing. An admin can change that."


def current() -> Actor | None:
    """Who is acting in this browser session, with the role of this moment; None = nobody is logged in."""
    settings = load_settings()
    if get_script_run_ctx(suppress_warning=True) is None:
        return access.os_user() if settings.auth == "none" else None
    if settings.auth == "password":
        return logins.who(settings, _token())
    if settings.auth == "oidc":
        return _from_provider(settings)
    return Actor(state.typed_annotator(settings), "admin")


def _token() -> str | None:
    return st.context.cookies.get(COOKIE)


def _from_provider(settings: Settings) -> Actor | None:
    """The user whom the identity provider vouches for, if an admin or a setting lets them in."""
    if not st.user.is_logged_in:
        return None
    name = identity(st.user.to_dict(), os.environ)
    if name is None:
        return None
    found = users.find_actor(settings, name)
    role = provider_role(os.environ)
    if found is not None or role is None:
        return found
    try:
        return Actor(users.clean_name(name), role, known=True)
    except ConfigError:
        return None


def can(action: str) -> bool:
    """Whether whoever looks at this page may do this: for leaving out what would be refused."""
    who = current()
    return who is not None and access.may(who.role, action)


def gate(settings: Settings) -> None:
    """Let the page go on for somebody who is logged in; for others, show how to, and stop."""
    access.use_source(current)
    if settings.auth == "none" or current() is not None:
        return
    style.title("Head Atlas", "a login is needed")
    if settings.auth == "password":
        st.html(f'<a href="{LOGIN}" target="_self" rel="nofollow">Log in</a>')
    elif not st.user.is_logged_in:
        st.button("Log in", type="primary", on_click=st.login, key="log_in")
    else:
        state.say_error(AccessError("the identity provider knows you, and this atlas does not: ask an admin"))
        st.button("Log out", on_click=st.logout, key="log_out")
    st.stop()


def _log_out(settings: Settings) -> None:
    logins.log_out(settings, _token())


def who_is_it(settings: Settings) -> None:
    """In the sidebar: the login's name and role, and the way out; without logins, a field for the name."""
    if settings.auth == "none":
        if "annotator" not in st.session_state:
            st.session_state["annotator"] = state.typed_annotator(settings)
        st.text_input(
            "Annotator", key="annotator", max_chars=state.NAME_LENGTH, help="Your notes carry this name."
        )
        return
    who = access.actor()
    st.markdown(f"**{state.plain(who.name)}** · {who.role}")
    if settings.auth == "password":
        st.button("Log out", key="log_out", on_click=_log_out, args=(settings,))
    else:
        st.button("Log out", key="log_out", on_click=st.logout)
