"""``atlas releases``: what is published, and removing what is no longer needed."""

from typing import TYPE_CHECKING

import click

from atlas.settings import load_settings

if TYPE_CHECKING:
    from atlas.store.release import ReleaseInfo


@click.command()
@click.option("--remove", "label", metavar="NAME@VERSION", help="Remove this version.")
@click.option("--force", is_flag=True, help="Remove it even if it is the current one.")
def releases(label: str | None, force: bool) -> None:
    """List published releases: name, version, date, size, rows, and which is current."""
    from atlas.store import published

    settings = load_settings()
    if label is not None:
        removed = published.remove(settings, label, force=force)
        click.echo(f"removed {removed.label}")
        return
    found = published.list_releases(settings)
    if not found:
        click.echo(f"no release in {published.place(settings)} yet; make one with `atlas build`")
        return
    lines = [_line(info) for info in found]
    header = ("RELEASE", "CREATED", "SIZE", "ROWS", "")
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    for row in [header, *lines]:
        name, created, size, rows, mark = (f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        click.echo(
            f"{name}  {created}  {size.strip():>{widths[2]}}  {rows.strip():>{widths[3]}}  {mark}".rstrip()
        )


def _line(info: "ReleaseInfo") -> tuple[str, str, str, str, str]:
    from atlas.store.build import read_manifest

    size, rows = info.size, info.rows
    if size is None or rows is None:
        rows = sum(count for count, _ in read_manifest(info.path).values())
        size = info.path.stat().st_size
    created = info.created[:19].replace("T", " ")
    return info.label, created, f"{size / 1e6:.1f} MB", f"{rows:,}", "current" if info.current else ""
