"""The command ``atlas``. Command modules import heavy rooms only when their command runs."""

import importlib
import keyword
import logging
import sys
from typing import Any

import click

from atlas import __version__
from atlas.errors import AtlasError, Cancelled
from atlas.logs import redact, set_up_logging
from atlas.settings import load_settings

COMMANDS = {
    "build": "atlas.cli.build",
    "demo": "atlas.cli.demo",
    "import": "atlas.cli.imports",
    "export": "atlas.cli.imports",
    "export-release": "atlas.cli.dashboards",
    "app": "atlas.cli.app",
    "sql": "atlas.cli.sql",
    "report": "atlas.cli.report",
    "study": "atlas.cli.study",
    "circuit": "atlas.cli.circuit",
    "ioi": "atlas.cli.ioi",
    "heads": "atlas.cli.heads",
    "tasks": "atlas.cli.tasks",
    "compare-reference": "atlas.cli.compare",
    "schema": "atlas.cli.schema",
    "releases": "atlas.cli.releases",
    "verify": "atlas.cli.verify",
    "status": "atlas.cli.status",
    "logs": "atlas.cli.logs",
    "cancel": "atlas.cli.status",
    "retry": "atlas.cli.retry",
    "worker": "atlas.cli.worker",
    "workers": "atlas.cli.workers",
    "gc": "atlas.cli.gc",
    "health": "atlas.cli.health",
    "metrics": "atlas.cli.metrics",
    "db": "atlas.cli.db",
    "annotations": "atlas.cli.annotations",
    "users": "atlas.cli.users",
}
"""Each command and the module that holds it under its own name."""


class _Lazy(click.Group):
    """A group whose commands are imported when they are named, so that `atlas sql` starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        # `import` is a word of Python's own, so its function has an underscore behind it.
        attribute = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name.replace("-", "_")
        found: Any = getattr(importlib.import_module(COMMANDS[cmd_name]), attribute)
        return found if isinstance(found, click.Command) else None


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="atlas")
def cli() -> None:
    """Head Atlas: what every attention head does, seen through sparse autoencoders."""


def main() -> None:
    """Run the command line; an AtlasError becomes one line on stderr and exit code 2."""
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    try:
        set_up_logging(load_settings())
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Cancelled as error:
        click.echo(str(error), err=True)
        sys.exit(130)
    except AtlasError as error:
        click.echo(f"error: {redact(str(error))}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
