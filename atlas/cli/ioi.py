"""``atlas ioi``: the indirect-object-identification experiments of seed 004 on any model, into tables."""

import re
import sys
from typing import TYPE_CHECKING

import click

from atlas.cli.circuit import RELEASE, SAES
from atlas.errors import ConfigError
from atlas.settings import load_settings

if TYPE_CHECKING:
    import pyarrow as pa

_HEAD = re.compile(r"L?(\d+)[H.](\d+)")
_SHOWN = {
    "ioi_splice": ("SAEs without error terms in the model", "prompts = all", None),
    "ioi_features": ("features at S2 by effect", "effect", 12),
    "ioi_noise": ("attn_out at S2 from other prompts", "prompts = all", None),
    "qk_explained": ("score of a mover to the second name, by path", "prompts = all", None),
}


def heads(text: str) -> tuple[tuple[int, int], ...]:
    """Heads as people write them.

    >>> heads("L8H6,9.9")
    ((8, 6), (9, 9))
    """
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _HEAD.fullmatch(word)
        if match is None:
            raise ConfigError(f"head {word!r} cannot be read; write it like L8H6 or 8.6")
        found.append((int(match[1]), int(match[2])))
    return tuple(found)


def numbers(text: str) -> tuple[int, ...]:
    """Comma-separated numbers; ConfigError for anything else.

    >>> numbers("5,6")
    (5, 6)
    """
    words = [part.strip() for part in text.split(",") if part.strip()]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"layers {text!r} cannot be read; write them like 5,6")
    return tuple(sorted({int(word) for word in words}))


@click.command()
@click.option("--name", help="Name of the study (ioi-MODEL); it replaces the last one of that name.")
@click.option("--prompts", default=100, show_default=True, help="Prompts, half of them ABBA, half BABA.")
@click.option("--seed", default=0, show_default=True, help="Seed of names, places and objects.")
@click.option("--layers", default="", metavar="5,6", help="Layers whose features are ablated at S2.")
@click.option("--receivers", default="", metavar="L8H6,...", help="Heads whose values at S2 are patched.")
@click.option("--movers", default="", metavar="L9H9,...", help="Heads whose attention scores are split.")
@click.option("--features", default=400, show_default=True, help="Most features of an SAE that are ablated.")
@RELEASE
@SAES
def ioi(
    name: str | None,
    prompts: int,
    seed: int,
    layers: str,
    receivers: str,
    movers: str,
    features: int,
    release: str | None,
    saes: str,
) -> None:
    """Run the IOI suite with a release's SAEs, print it, and keep its tables for SQL and the app.

    Splices SAEs one by one and in groups; ablates every live feature and the error term at S2, also on the
    path into the receivers' values; noises attention outputs; splits movers' scores into pairs of features.
    What is not named is chosen by rule (docs/circuits.md).
    """
    from atlas.circuits.ioi_study import Choices, IOIStudy
    from atlas.circuits.opening import open_circuits
    from atlas.cli.display import display
    from atlas.store.studies import study_table, write_study

    settings = load_settings()
    bench = open_circuits(release, settings, saes.split(","))
    asked = Choices(prompts, seed, numbers(layers), heads(receivers), heads(movers), features)
    study = IOIStudy(bench, asked)
    name = name or f"ioi-{bench.model.name}"
    with display("ioi") as progress:
        rows = study.rows(progress)
    write_study(settings, name, study.about(_command(sys.argv)), rows)
    if study.words.substitute:
        click.echo("few first names are single tokens here; other capitalised words stand for names")
    chosen = study.choices
    for what, some in (("receivers", chosen.receivers), ("movers", chosen.movers)):
        click.echo(f"{what}: {', '.join(f'L{n}H{h}' for n, h in some)}")
    for table in _SHOWN:
        _print(table, study_table(settings, table), name)
    click.echo(f"study {name!r}: {', '.join(f'{len(some)} rows of {t}' for t, some in rows.items())}")


def _command(words: list[str]) -> str:
    import shlex

    return shlex.join(["atlas", *words[1:]])


def _print(table: str, rows: "pa.Table", name: str) -> None:
    import pyarrow.compute as pc

    from atlas.store.export import to_text

    title, how, most = _SHOWN[table]
    rows = rows.filter(pc.equal(rows["study"], name)).drop_columns(["study"])
    if "prompts" in rows.column_names:
        rows = rows.filter(pc.equal(rows["prompts"], "all")).drop_columns(["prompts"])
    if how == "effect":
        rows = rows.sort_by([(how, "descending")])
    if not rows.num_rows:
        return
    click.echo(f"\n{title}")
    click.echo(to_text(rows.slice(0, most)))
