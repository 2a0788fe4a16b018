"""``atlas gc``: free the disk of step outputs that nothing needs any more."""

from collections import defaultdict
from typing import TYPE_CHECKING

import click

from atlas.settings import load_settings

if TYPE_CHECKING:
    from atlas.pipeline.garbage import Freed


@click.command()
@click.option(
    "--keep-hours",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Keep outputs and checkpoints younger than this.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
def gc(keep_hours: float, dry_run: bool) -> None:
    """Remove step outputs, checkpoints, residual streams and temporary files that no build or release needs.

    Kept are outputs of runs under way, of the newest run of each release, SAEs that a release names, and
    what is younger than --keep-hours. Safe beside running builds. Releases go with `atlas releases --remove`.
    """
    from atlas.pipeline.garbage import collect

    freed = collect(load_settings(), grace=keep_hours * 3600, dry_run=dry_run)
    for one in sorted(freed, key=lambda one: -one.size):
        if one.what != "lock":
            click.echo(f"{one.size / 1e6:10.1f} MB  {one.what}  {one.name}")
    click.echo(_summary(freed, "would free" if dry_run else "freed"))


def _summary(freed: "list[Freed]", verb: str) -> str:
    """One line: bytes, and how many of each kind."""
    if not freed:
        return "nothing to remove"
    counts: dict[str, int] = defaultdict(int)
    for one in freed:
        counts[one.what] += 1
    parts = ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for what, n in sorted(counts.items()))
    return f"{verb} {sum(one.size for one in freed) / 1e6:.1f} MB: {parts}"
