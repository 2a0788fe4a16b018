"""``atlas import`` and ``atlas export``: other people's SAE files, in and out."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from atlas.errors import SAEError
from atlas.settings import Settings, load_settings

if TYPE_CHECKING:
    from atlas.interop.foreign import Given
    from atlas.interop.importing import Outcome
    from atlas.sae.library import Imported

KISSANE = "kissane-gpt2"
READ = ("saelens", "kissane", "sparsify", "dictionary_learning", "openmoss", "openmoss-old")
WRITTEN = ("saelens", "sparsify", "dictionary_learning", "openmoss")


@click.command("import")
@click.argument("what", required=False)
@click.option("--name", help="Name in the library, such as gpt2/L05.z.mine (one SAE only).")
@click.option("--model", help="The model, where the file does not say or says another name.")
@click.option("--site", help="The site, such as L05.z or L05.H03.q, where the file does not say.")
@click.option("--processing", type=click.Choice(["raw", "folded"]), help="Weights it was trained on.")
@click.option("--format", "only", type=click.Choice(READ), help="Look for this format alone.")
@click.option("--list", "listed", is_flag=True, help="Show what is imported.")
@click.option("--remove", metavar="NAME", help="Remove an imported SAE.")
def import_(
    what: str | None,
    name: str | None,
    model: str | None,
    site: str | None,
    processing: str | None,
    only: str | None,
    listed: bool,
    remove: str | None,
) -> None:
    """Import SAEs into the library of this machine, from where a build can use them.

    WHAT is a file, a folder (searched to its depths), hf:OWNER/REPO[/FOLDER], or kissane-gpt2: the 12
    published attention SAEs of GPT-2 small. See docs/formats.md.
    """
    settings = load_settings()
    home = settings.home
    if (what is not None) + listed + (remove is not None) != 1:
        raise click.UsageError("name one of: WHAT to import, --list, --remove NAME")
    if remove is not None:
        from atlas.sae.library import imported_names, remove_imported
        from atlas.sae.library_lake import withdraw_imported

        if not withdraw_imported(settings, remove) or remove in imported_names(home):
            remove_imported(home, remove)
        click.echo(f"removed {remove}")
    elif listed:
        from atlas.sae.library_lake import bring_imported

        bring_imported(settings)
        _list(home)
    elif what is not None:
        from atlas.interop.foreign import Given

        given = Given(model, site, processing, name)
        found = _hub(home, what, given, only) if _on_hub(what) else _local(home, what, given, only)
        _report(_shared(settings, found))


def _shared(settings: Settings, outcomes: "Iterable[Outcome]") -> "Iterator[Outcome]":
    """Every SAE that was imported is in the lake's library, too, if there is one."""
    from atlas.sae.library_lake import share_imported

    for outcome in outcomes:
        if outcome.entry is not None:
            share_imported(settings, outcome.entry.name)
        yield outcome


def _on_hub(what: str) -> bool:
    return what.startswith("hf:") or what == KISSANE


def _local(home: Path, what: str, given: "Given", only: str | None) -> "Iterator[Outcome]":
    from atlas.interop.importing import import_path

    return import_path(home, Path(what).expanduser(), given, only)


def _hub(home: Path, what: str, given: "Given", only: str | None) -> "Iterator[Outcome]":
    from atlas.interop.hub import hub_folder
    from atlas.interop.hub_import import KISSANE_GPT2, HubImport
    from atlas.sae.library import imported_names

    published = what == KISSANE
    place = KISSANE_GPT2 if published else hub_folder(what)
    only = "kissane" if published and only is None else only
    before = len(imported_names(home))
    try:
        with _asking(place.name):
            work = HubImport(home, place, only)
        with _download_display(what, work.total_bytes) as progress:
            yield from work.run(given, progress)
    except SAEError as error:
        kept = len(imported_names(home))
        raise SAEError(
            f"{error}; the library keeps its {kept} SAEs ({kept - before} new), and the same command goes on"
        ) from None


def _report(outcomes: "Iterable[Outcome]") -> None:
    """A line per SAE; one that was refused does not stop those after it. A lone error is raised as it is."""
    done, refused = 0, []
    try:
        for outcome in outcomes:
            if outcome.entry is not None:
                done += 1
                click.echo(_line(outcome.entry) + ("" if outcome.new else "  (already there)"))
            elif outcome.error is not None:
                refused.append(outcome.error)
    finally:
        lone = done == 0 and len(refused) == 1
        for error in () if lone else refused:
            click.echo(f"error: {error}", err=True)
    if lone:
        raise refused[0]
    if refused:
        raise SAEError(f"{len(refused)} of {done + len(refused)} SAEs were not imported")


def _list(home: Path) -> None:
    from atlas.sae.library import find_imported, imported_names, library

    names = imported_names(home)
    if not names:
        click.echo(f"no SAE in {library(home)} yet; import one with `atlas import`")
    for name in names:
        try:
            click.echo(_line(find_imported(home, name)))
        except SAEError as error:
            click.echo(f"{name}  {error}")


def _line(entry: "Imported") -> str:
    return (
        f"{entry.name}  {entry.site.name}  {entry.d_in} -> {entry.d_sae}  "
        f"{entry.architecture}  {entry.processing}"
    )


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """A note on the terminal while the hub is asked, for it is asked again before it counts as away."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"asking the hub for {name}") if console.is_terminal else nullcontext():
        yield


@contextmanager
def _download_display(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Bytes, rate and time left while a download runs; a line now and then where there is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if total == 0:
        yield lambda _: None
    elif not console.is_terminal:
        yield _Lines(console.print, name, total).update
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        # Lines for a pipe must not end on the terminal with the bar.
        both = sys.stdout.isatty()
        with Progress(*columns, console=console, transient=True, redirect_stdout=both) as bars:
            task = bars.add_task(name, total=total)
            yield lambda n: bars.update(task, advance=n)


class _Lines:
    """At most a line every ten seconds, for logs and pipes."""

    seconds = 10.0

    def __init__(self, say: Callable[[str], None], name: str, total: int) -> None:
        self._say, self._name, self._total = say, name, total
        self._started = self._said = time.monotonic()
        self._done = 0

    def update(self, arrived: int) -> None:
        self._done += arrived
        now = time.monotonic()
        if now - self._said < self.seconds:
            return
        self._said = now
        rate = self._done / max(now - self._started, 1e-9)
        left = max(self._total - self._done, 0) / rate if rate else 0.0
        self._say(
            f"  {self._name}: {self._done / 1e6:.1f}/{self._total / 1e6:.1f} MB, {rate / 1e6:.2g} MB/s, "
            f"{left:.0f} s left"
        )


@click.command()
@click.argument("sae")
@click.option(
    "--to", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write; must be new."
)
@click.option(
    "--format", "kind", type=click.Choice(WRITTEN), default="saelens", show_default=True, help="Whose format."
)
def export(sae: str, folder: Path, kind: str) -> None:
    """Write SAE, imported or trained here, into a folder in another format."""
    from atlas.interop import exporting

    found = exporting.find_sae(load_settings(), sae)
    exporting.export(found, folder.expanduser(), kind)
    click.echo(f"{found.info.name}: {kind} in {folder}")
