"""``atlas app``: serve the app over the current release."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from atlas.db.schema import ensure_schema, exists
from atlas.db.users import list_users
from atlas.errors import ConfigError, DatabaseError
from atlas.oidc import oidc_secrets
from atlas.settings import Settings, load_settings
from atlas.store import published

RELEASE_VARIABLE = "ATLAS_RELEASE"
LOCAL = ("127.0.0.1", "localhost", "::1")
_FLAGS = {
    # Otherwise a newer request runs beside the older one, and both change the same session (app/whole.py).
    "runner.fastReruns": "false",
    # Runs after which a browser lets go of a large message that it does not need. Streamlit's own 2 is so few
    # that one on a slow way lets go of what the server already refers to, which ends the page with an error.
    "global.maxCachedMessageAge": "100",
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": "false",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "client.showErrorLinks": "false",
    # A full collection after every run costs a tenth of a second; Python collects by itself when it has to.
    "runner.postScriptGC": "false",
    # The pages write what they mean; looking through their code for bare expressions takes time at the first.
    "runner.magicEnabled": "false",
    "theme.light.primaryColor": "#0072b2",
    "theme.dark.primaryColor": "#58aee8",
    "theme.baseFontSize": "15",
    "theme.codeFontSize": "0.82rem",
    "theme.showWidgetBorder": "true",
}


def main_file() -> Path:
    """The script of the app's pages; ConfigError where the app is not installed."""
    found = find_spec("app")
    if found is None or found.origin is None:
        raise ConfigError("package 'app' is not installed; install head-atlas as a whole")
    return Path(found.origin).with_name("main.py")


def streamlit_command(port: int, address: str) -> list[str]:
    """The command that serves the app.

    >>> streamlit_command(8501, "127.0.0.1")[3:5]
    ['run', '--server.port=8501']
    """
    flags = [f"--{name}={value}" for name, value in _FLAGS.items()]
    place = [f"--server.port={port}", f"--server.address={address}"]
    return [sys.executable, "-m", "streamlit", "run", *place, *flags, str(main_file().with_name("server.py"))]


def _check_access(settings: Settings, address: str) -> None:
    """Say at once what a login lacks, and warn where everybody in the network would be let in."""
    if settings.auth == "oidc":
        oidc_secrets(os.environ)
    try:
        if settings.auth != "none" or exists(settings):
            ensure_schema(settings)
    except DatabaseError as error:
        if settings.auth != "none":  # nobody could log in
            raise
        click.echo(f"warning: {error}", err=True)
    if settings.auth == "password" and not list_users(settings):
        click.echo(
            "warning: nobody can log in yet; add somebody: atlas users add NAME --role admin", err=True
        )
    if settings.auth == "none" and address not in LOCAL:
        click.echo(
            f"warning: others can reach {address}, and ATLAS_AUTH=none lets everybody write and start "
            "jobs; set ATLAS_AUTH=password (docs/access.md)",
            err=True,
        )


@click.command()
@click.option("--port", default=8501, show_default=True, type=click.IntRange(1, 65535), help="Port.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for all.")
@click.option("--release", "release_name", help="A release's name; without it the newest one.")
def app(port: int, address: str, release_name: str | None) -> None:
    """Serve the app: browse heads and features, annotate, ask in SQL."""
    settings = load_settings()
    _check_access(settings, address)
    environment = dict(os.environ)
    if release_name is not None:
        published.current(settings, release_name)
        environment[RELEASE_VARIABLE] = release_name
    shown = "localhost" if address in ("127.0.0.1", "0.0.0.0", "::") else address  # noqa: S104
    click.echo(f"Head Atlas: http://{shown}:{port}  (Ctrl-C stops it)")
    server = subprocess.Popen(streamlit_command(port, address), env=environment, stdout=subprocess.DEVNULL)
    # A service manager ends this process alone; the server must not outlive it.
    before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        code = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        code = server.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code > 0:
        raise ConfigError(f"the app ended with code {code}; is port {port} of {address} taken?")
