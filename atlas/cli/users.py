"""``atlas users``: who may log in to the app, and as what."""

import sys

import click

from atlas.access import ROLES
from atlas.db import users as people
from atlas.errors import ConfigError
from atlas.settings import load_settings

_ROLE = click.Choice(ROLES)


def _password(from_stdin: bool) -> str:
    """A new password: asked for twice without showing it, or one line of standard input."""
    if from_stdin:
        line = sys.stdin.readline()
        if not line:
            raise ConfigError("standard input holds no password; give one line")
        return line.rstrip("\r\n")
    asked: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    return asked


@click.group()
def users() -> None:
    """Add, change and remove those who may log in to the app (with ATLAS_AUTH=password or oidc)."""


@users.command()
@click.argument("name")
@click.option("--role", type=_ROLE, default="annotator", show_default=True, help="What they may do.")
@click.option("--no-password", is_flag=True, help="Only through the identity provider; NAME is the e-mail.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
def add(name: str, role: str, no_password: bool, password_stdin: bool) -> None:
    """Let NAME log in; asks for a password. Their notes will carry NAME."""
    settings = load_settings()
    people.add_user(settings, name, role, None if no_password else _password(password_stdin))
    click.echo(f"added {name} as {role}")


@users.command()
@click.argument("name")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
def passwd(name: str, password_stdin: bool) -> None:
    """Give NAME a new password and end all their logins."""
    people.set_password(load_settings(), name, _password(password_stdin))
    click.echo(f"changed the password of {name}; their logins have ended")


@users.command()
@click.argument("name")
@click.argument("to", type=_ROLE, metavar="ROLE")
def role(name: str, to: str) -> None:
    """Make NAME a reader, an annotator or an admin; it counts at once."""
    people.set_role(load_settings(), name, to)
    click.echo(f"{name} is {to} now")


@users.command(name="list")
def list_() -> None:
    """Everybody who may log in: name, role, whether with a password, browsers logged in."""
    found = people.list_users(load_settings())
    if not found:
        click.echo("nobody yet; add somebody: atlas users add NAME --role admin")
        return
    width = max(4, *(len(user.name) for user in found))
    click.echo(f"{'NAME':<{width}}  {'ROLE':<9}  {'PASSWORD':<8}  LOGINS")
    for user in found:
        password = "yes" if user.has_password else "no"
        click.echo(f"{user.name:<{width}}  {user.role:<9}  {password:<8}  {user.logins}")


@users.command()
@click.argument("name")
def remove(name: str) -> None:
    """End NAME's logins and forget the password. What they wrote stays, under their name."""
    people.remove_user(load_settings(), name)
    click.echo(f"removed {name}")
