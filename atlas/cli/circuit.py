"""``atlas circuit``: what a feature is made of on a prompt, and strong paths between attention features."""

import json
from pathlib import Path

import click

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
@click.option("--breadth", default=5, show_default=True, help="Terms of a node that are kept.")
@click.option("--depth", default=3, show_default=True, help="Attention features on a path.")
@click.option("--nodes", default=200, show_default=True, help="Most nodes.")
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
