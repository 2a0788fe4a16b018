"""``atlas circuit``: what a feature is made of on a prompt, and strong paths between attention features."""

import json
import shlex
import sys
from pathlib import Path

import click

from atlas.settings import load_settings

RELEASE = click.option(
    "--release", metavar="NAME", help="Release, or NAME@VERSION, whose SAEs are used; the newest by default."
)
SAES = click.option(
    "--saes",
    default="*",
    show_default=True,
    metavar="PATTERNS",
    help="Names of SAEs, comma-separated; * fits any.",
)


@click.group()
def circuit() -> None:
    """Trace features through attention and residual SAEs (recursive direct feature attribution)."""


@circuit.command()
@click.argument("prompt")
@click.option("--sae", required=True, help="SAE of the feature: its name, or its site such as L05.z.")
@click.option("--feature", required=True, type=int, help="The feature's number.")
@click.option("--position", default=-1, show_default=True, help="Position, 0 is BOS; negative: from the end.")
@click.option("--breadth", default=4, show_default=True, help="Terms of a node that are kept.")
@click.option("--depth", default=3, show_default=True, help="Attention features on a path.")
@click.option("--nodes", default=40, show_default=True, help="Most nodes.")
@click.option("--no-residual", is_flag=True, help="Split sources by component even if residual SAEs exist.")
@click.option("--json", "own", type=click.Path(path_type=Path, dir_okay=False), help="Write the trace here.")
@click.option(
    "--graph", type=click.Path(path_type=Path, dir_okay=False), help="Write circuit-tracer's graph form here."
)
@RELEASE
@SAES
def trace(
    prompt: str,
    sae: str,
    feature: int,
    position: int,
    breadth: int,
    depth: int,
    nodes: int,
    no_residual: bool,
    own: Path | None,
    graph: Path | None,
    release: str | None,
    saes: str,
) -> None:
    """Print what made a feature fire on PROMPT: sources, residual features, components, and so on.

    Each line is a term of the line above it, with its share; the terms of each node sum to its value, and the
    largest remainder is printed.
    """
    from atlas.circuits.graph import as_text, circuit_tracer
    from atlas.circuits.nodes import Bounds
    from atlas.circuits.opening import open_circuits

    bench = open_circuits(release, saes=saes.split(","))
    bounds = Bounds(breadth, depth, nodes, residual=not no_residual)
    found = bench.tracer().trace(prompt, bench.name(sae), feature, position, bounds)
    click.echo(as_text(found, breadth))
    if own is not None:
        _write(own, found.to_plain())
    if graph is not None:
        _write(graph, circuit_tracer(found, graph.stem))


def _write(path: Path, plain: object) -> None:
    from atlas.store.atomic import atomic_file

    with atomic_file(path.expanduser().absolute()) as work:
        work.write_text(json.dumps(plain, ensure_ascii=False), encoding="utf8")
    click.echo(f"written: {path}", err=True)


@circuit.command()
@click.argument("prompt")
@click.option("--sae", help="One SAE, by name or site; all attention SAEs by default.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 1000), help="Of each SAE.")
@RELEASE
@SAES
def features(prompt: str, sae: str | None, top: int, release: str | None, saes: str) -> None:
    """List the features that fire most strongly on PROMPT, to have something to trace."""
    from atlas.circuits.opening import open_circuits
    from atlas.circuits.passes import token_texts, tokenise

    bench = open_circuits(release, saes=saes.split(","))
    tracer, tokens = bench.tracer(), tokenise(bench.model, prompt)
    texts = token_texts(bench.model, tokens)
    names = [bench.name(sae)] if sae else [w.sae.info.name for _, w in sorted(tracer.attention.items())]
    for name in names:
        for number, position, activation in tracer.strongest(tokens, name, top):
            click.echo(f"{name}  feature {number:<6} {activation:8.3f}  at {position} {texts[position]}")


@circuit.command()
@click.option("--name", help="Name of the study (paths-MODEL); it replaces the last one of that name.")
@click.option("--blocks", default=64, show_default=True, type=click.IntRange(1), help="Blocks of text.")
@click.option("--positions", default=4, show_default=True, help="Positions of each block that are looked at.")
@click.option("--features", default=8, show_default=True, help="Features of each layer at each of them.")
@click.option("--share", default=0.05, show_default=True, help="Least share of the pre-activation.")
@click.option("--seed", default=0, show_default=True, help="Seed of the positions.")
@RELEASE
@SAES
def scan(
    name: str | None,
    blocks: int,
    positions: int,
    features: int,
    share: float,
    seed: int,
    release: str | None,
    saes: str,
) -> None:
    """Look for strong paths from attention feature to attention feature over a release's text.

    Keeps them as table circuit_paths, which SQL sees beside any release, and prints the strongest.
    """
    import pyarrow as pa

    from atlas.analysis.text import ArrayBlocks
    from atlas.circuits.opening import open_circuits, release_text
    from atlas.circuits.scan import Scanned
    from atlas.circuits.scan import scan as scan_paths
    from atlas.cli.display import display
    from atlas.store.export import to_text
    from atlas.store.studies import write_study

    settings = load_settings()
    bench = open_circuits(release, settings, saes.split(","))
    text, how = release_text(bench.release, blocks), Scanned(positions, features, share, seed)
    with display("scan") as progress:
        rows = scan_paths(bench.tracer(), ArrayBlocks(text), len(text), how, progress)
    name = name or f"paths-{bench.model.name}"
    about = {
        "kind": "paths", "model": bench.model.name, "release": bench.release.label,
        "command": shlex.join(["atlas", *sys.argv[1:]]),
        "settings": json.dumps({**vars(how), "blocks": len(text)}, sort_keys=True),
    }  # fmt: skip
    write_study(settings, name, about, {"circuit_paths": rows})
    click.echo(to_text(pa.Table.from_pylist(rows[:20])) if rows else "no path reaches that share")
    click.echo(f"study {name!r}: {len(rows)} paths over {len(text)} blocks")


@circuit.command()
@click.option("--remove", metavar="NAME", help="Remove this study.")
def studies(remove: str | None) -> None:
    """List the studies whose tables SQL sees, with the command that makes each again."""
    from atlas.store.studies import remove_study, study_table

    settings = load_settings()
    if remove is not None:
        remove_study(settings, remove)
        click.echo(f"removed {remove}")
        return
    known = study_table(settings, "studies").to_pylist()
    if not known:
        click.echo("no study yet; make one with `atlas ioi` or `atlas circuit scan`")
    for one in known:
        click.echo(f"{one['study']}  {one['kind']}  {one['model']}  {one['created'][:16]}  {one['command']}")
