"""``atlas retry``: what failed or was cancelled, once more."""

import click

from atlas.cli.build import run_build
from atlas.configs import BuildConfig
from atlas.db.runs import load_run
from atlas.errors import ConflictError
from atlas.settings import load_settings


@click.command()
@click.argument("run")
@click.option("--detach", is_flag=True, help="Return at once; the build goes on by itself.")
def retry(run: str, detach: bool) -> None:
    """Do again what failed or was cancelled in RUN, as a new run of the same config.

    What the old run finished is current and is not done again; training goes on from its last checkpoint.
    """
    found = load_run(load_settings(), run)
    if found.status not in ("failed", "cancelled"):
        raise ConflictError(f"run {run} is {found.status!r}; allowed: a run that failed or was cancelled")
    run_build(BuildConfig.from_json(found.config_json), detach=detach)
