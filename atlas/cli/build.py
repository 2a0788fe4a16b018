"""``atlas build``: from a model and a text to a published release."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atlas.configs import ARCHITECTURES, BuildConfig
from atlas.errors import ConfigError
from atlas.plain import from_plain, to_plain
from atlas.settings import Settings, load_settings
from atlas.sweeps import expand_sweeps, read_sweep

if TYPE_CHECKING:
    from atlas.pipeline.plan import Plan

_NUMBER = re.compile(r"[0-9]{1,4}")


def _numbers(what: str, text: str | None) -> str | tuple[int, ...] | None:
    """``all``, or numbers and ranges such as ``0,3-5``.

    >>> _numbers("layer", "0,3-5")
    (0, 3, 4, 5)
    """
    if text is None or text == "all":
        return text
    out: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not _NUMBER.fullmatch(low) or (dash and not (_NUMBER.fullmatch(high) and int(low) <= int(high))):
            raise ConfigError(f"{what} {part!r} cannot be read; allowed: all, or numbers such as 0,3-5")
        out += range(int(low), int(high or low) + 1)
    return tuple(out)


FLAGS = {
    "release": ("", "release"),
    "model": ("model", "name"),
    "processing": ("model", "processing"),
    "corpus": ("corpus", "source"),
    "blocks": ("corpus", "blocks"),
    "context": ("corpus", "context"),
    "sites": ("sites", "kinds"),
    "layers": ("sites", "layers"),
    "heads": ("sites", "heads"),
    "architecture": ("sae", "architecture"),
    "expansion": ("sae", "expansion"),
    "d_sae": ("sae", "d_sae"),
    "k": ("sae", "k"),
    "l1": ("sae", "l1_coefficient"),
    "lr": ("sae", "lr"),
    "dead_features": ("sae", "dead_features"),
    "normalize": ("sae", "normalize_activations"),
    "objective": ("sae", "objective"),
    "sweep": ("sae", "sweep"),
    "imports": ("", "imports"),
    "tokens": ("train", "tokens"),
    "batch": ("train", "batch"),
    "seed": ("train", "seed"),
    "precision": ("train", "precision"),
    "parts": ("train", "parts"),
    "cache": ("train", "cache"),
    "prune": ("", "prune"),
    "finetune": ("", "finetune"),
    "eval_blocks": ("evaluation", "blocks"),
    "analysis_blocks": ("analysis", "blocks"),
}
"""The section and key of the config that each flag sets; sae flags set the only [[sae]] table."""


@click.command()
@click.argument("config_file", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Bundled model, local Hugging Face folder, or hub name.")
@click.option("--processing", help="raw or folded weights.")
@click.option("--corpus", help="stdlib, a .txt, .jsonl or .parquet file, a folder of text, or hf:NAME.")
@click.option("--blocks", type=int, help="Most token blocks to take from the text.")
@click.option("--context", type=int, help="Tokens in a block, BOS included.")
@click.option("--sites", help="Comma-separated: z, q, k, v, resid_pre, attn_out, mlp_out.")
@click.option("--layers", help="all, or numbers such as 0,3-5.")
@click.option("--heads", help="Single heads: all, or numbers such as 0,3-5.")
@click.option("--architecture", help=f"{', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}.")
@click.option("--expansion", type=int, help="d_sae as a multiple of d_in.")
@click.option("--d-sae", type=int, help="Number of features.")
@click.option("--k", type=int, help="topk, batchtopk, matryoshka: features kept per token.")
@click.option("--l1", type=float, help="relu, gated: weight of the L1 penalty.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--dead-features", help="What is done for dead features: auto, auxk, resample, ghost or none.")
@click.option("--normalize", help="Inputs: none, constant_norm_rescale (to norm sqrt(d_in)) or layer_norm.")
@click.option("--objective", help="mse; beside it, for q and k, scores or pattern; for any site, kl.")
@click.option(
    "--sweep",
    multiple=True,
    metavar="KEY=A,B,...",
    help="One SAE per value of a key of [[sae]], such as l1_coefficient=0.1,1,10; several --sweep: each "
    "combination.",
)
@click.option("--imports", help="Comma-separated names of imported SAEs (see atlas import); * matches any.")
@click.option("--no-train", is_flag=True, help="Train nothing: imported SAEs only.")
@click.option("--tokens", type=int, help="Training tokens.")
@click.option("--batch", type=int, help="Tokens per optimiser step.")
@click.option("--precision", help="Matrix products in float32, bfloat16 or auto.")
@click.option(
    "--parts", type=int, help="Training steps that the sites are dealt out to, for several workers."
)
@click.option("--cache", is_flag=True, help="Keep activations on disk, for sweeps and repeated runs.")
@click.option("--prune", is_flag=True, help="Take out features that hardly fire; limits under [prune].")
@click.option("--finetune", is_flag=True, help="Then train the decoders against feature suppression.")
@click.option("--eval-blocks", type=int, help="Held-out blocks.")
@click.option("--analysis-blocks", type=int, help="Blocks that the tables summarise.")
@click.option("--seed", type=int, help="Seed of training.")
@click.option("--release", help="Name of the release; the model's name by default.")
@click.option("--dry-run", is_flag=True, help="Print the steps with what each would cost; do nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: as JSON.")
@click.option(
    "--flops",
    metavar="RATE",
    help="With --dry-run: times at so many FLOP per second (2e14), or at the rate 'measured' here.",
)
@click.option(
    "--detach", is_flag=True, help="Return at once; the build goes on by itself (see atlas status)."
)
def build(config_file: Path | None, detach: bool, **flags: Any) -> None:
    """Train SAEs, evaluate them, make the tables and publish a release.

    CONFIG_FILE is a TOML file (see docs/build.md), or JSON as a run keeps it; flags override it. Run again,
    it does only what is not current; interrupted, it goes on where it was. With ATLAS_BROKER_URL set,
    workers do the work.
    """
    dry_run, as_json, rate = (flags.pop(name) for name in ("dry_run", "as_json", "flops"))
    config = with_flags(_read_config(config_file), flags)
    if dry_run:
        from atlas.cli.dry_run import read_rate, show_plan

        show_plan(config, load_settings(), as_json=as_json, rate=read_rate(rate))
    else:
        run_build(config, detach=detach)


def _read_config(path: Path | None) -> BuildConfig:
    if path is None:
        return BuildConfig()
    if path.suffix != ".json":
        return BuildConfig.from_toml(path)
    try:
        return BuildConfig.from_json(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error}") from None


def with_flags(config: BuildConfig, flags: dict[str, Any]) -> BuildConfig:
    """The config with the command line's flags put over it; a switch that is off changes nothing.

    >>> with_flags(BuildConfig(), {"model": "docs-2l", "sites": "q,k", "heads": "all"}).sites.kinds
    ('q', 'k')
    >>> [sae.label for sae in with_flags(BuildConfig(), {"sweep": ("k=8,16",)}).sae]
    ['k-8', 'k-16']
    """
    given = {name: v for name, v in flags.items() if v is not None and v is not False and v != ()}
    plain = to_plain(config)
    if given.pop("no_train", False):
        plain["sae"] = []
    for name, value in _read(given, plain).items():
        section, key = FLAGS[name]
        if section == "sae" and len(plain["sae"]) != 1:
            what = "is ambiguous" if plain["sae"] else "has no SAE to apply to"
            raise ConfigError(
                f"--{name.replace('_', '-')} {what}: there are {len(plain['sae'])} [[sae]] tables"
            )
        place = plain if section == "" else plain["sae"][0] if section == "sae" else plain[section]
        place[key] = value
    return from_plain(BuildConfig, expand_sweeps(plain))


def _read(given: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The flags as the config writes their values."""
    out = dict(given)
    for name in ("sites", "imports"):
        if name in out:
            out[name] = out[name].split(",")
    for name in ("layers", "heads"):
        if name in out:
            out[name] = _numbers(name[:-1], out[name])
    if "sweep" in out:
        out["sweep"] = dict(read_sweep(text) for text in out["sweep"])
    for name in ("prune", "finetune"):
        if name in out:
            out[name] = plain[name] or {}
    return out


def run_build(config: BuildConfig, *, dry_run: bool = False, detach: bool = False) -> None:
    """Plan and carry out a build here or, with a broker, through workers; ``detach``: do not wait for it."""
    from atlas.pipeline.execute import waiting_for
    from atlas.pipeline.plan import make_plan
    from atlas.store.published import current, place

    settings = load_settings()
    if dry_run:
        from atlas.cli.dry_run import show_plan

        show_plan(config, settings)
        return
    plan = make_plan(config, settings)
    waiting = waiting_for(plan, settings)
    started = time.monotonic()
    if not waiting:
        click.echo("everything is current", err=True)
    elif detach:
        _detach(plan, settings)
        return
    elif settings.broker_url is not None:
        from atlas.cli.worker import wait

        wait(_hand_over(plan, settings), settings)
    else:
        from atlas.cli.display import step_display
        from atlas.pipeline.local import run_local

        run_local(plan, settings, step_display)
    info = current(settings, config.release_name, fresh=True)
    where = info.path if settings.lake_url is None else place(settings)
    click.echo(f"release {info.label}: {where} ({time.monotonic() - started:.0f} s)")


def _hand_over(plan: "Plan", settings: Settings) -> str:
    """Record the run for the workers, send what is ready, and return the run's id."""
    from atlas.pipeline.local import begin
    from atlas.queue import send_ready

    run = begin(plan, settings, "queue")
    send_ready(settings, run.id)
    return run.id


def _detach(plan: "Plan", settings: Settings) -> None:
    """Hand the plan to the workers, or to a process of its own."""
    if settings.broker_url is not None:
        click.echo(f"run {_hand_over(plan, settings)} goes on in the workers; look: atlas status")
        return
    from atlas.launch import launch

    started = launch(settings, plan.config)
    click.echo(f"the build goes on as process {started.pid}, which writes {started.log}; look: atlas status")
