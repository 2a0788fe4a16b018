"""What `atlas app` serves: the pages of ``main.py``, with the login in front where one is asked for."""

import os
from pathlib import Path

from starlette.middleware import Middleware
from streamlit.starlette import App

from app import access as app_access
from app import warm
from app.login import Gate, routes
from app.shell import Shell
from atlas import access
from atlas.logs import set_up_logging
from atlas.oidc import oidc_secrets
from atlas.settings import load_settings

settings = load_settings()
set_up_logging(settings)
access.use_source(app_access.current)
app = App(
    Path(__file__).with_name("main.py"),
    routes=routes(settings),
    middleware=[*([Middleware(Gate)] if settings.auth == "password" else []), Middleware(Shell)],
    secrets={"auth": oidc_secrets(os.environ)} if settings.auth == "oidc" else None,
)
warm.begin(settings)
