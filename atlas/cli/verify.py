"""``atlas verify``: is a release what it says it is?"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from atlas.errors import StoreError
from atlas.settings import load_settings

if TYPE_CHECKING:
    from atlas.store.verify import Finding

_NAME, _COUNT = 34, 14


@click.command()
@click.argument("release", required=False, metavar="[RELEASE]")
@click.option("--quick", is_flag=True, help="Leave out the digests of whole tables.")
@click.option("--only", "names", multiple=True, metavar="CHECK", help="Run only this check; repeatable.")
@click.option("--broken", is_flag=True, help="Show only what is broken.")
def verify(release: str | None, quick: bool, names: tuple[str, ...], broken: bool) -> None:
    """Re-check the invariants of a release and name what is broken.

    RELEASE is a name, NAME@VERSION, or a release's file; without it the newest release. Exit status 1 if
    anything is broken.
    """
    from atlas.store import verify as verifying

    path = _file(release)
    click.echo(f"{path.stem}\n{'CHECK':<{_NAME}}{'ROWS':>{_COUNT}}{'OFFENDING':>{_COUNT}}")
    failed = looked = 0
    for finding in verifying.verify(path, contents=not quick, only=names):
        looked += 1
        failed += not finding.ok
        if not (broken and finding.ok):
            click.echo(_line(finding))
    if failed:
        click.echo(f"{failed} of {looked} checks are broken")
        raise click.exceptions.Exit(1)
    click.echo(f"all {looked} checks hold")


def _file(release: str | None) -> Path:
    from atlas.store import published

    if release is not None and release.endswith(".duckdb"):
        path = Path(release)
        if not path.is_file():
            raise StoreError(f"release {release} does not exist")
        return path
    return published.current(load_settings(), release).path


def _line(finding: "Finding") -> str:
    counts = f"{finding.name:<{_NAME}}{finding.looked_at:>{_COUNT},}{finding.offending:>{_COUNT},}"
    if finding.ok:
        return f"{counts}  ok"
    return f"{counts}  BROKEN: {finding.meaning}\n{'':<{_NAME}}  first: {finding.first}"
