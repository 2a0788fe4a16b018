"""``atlas tasks``: what the loss on a task loses without each head, outside any build."""

from pathlib import Path
from typing import Any

import click

from atlas.errors import ConfigError
from atlas.settings import load_settings


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", default="docs-12l", show_default=True, help="Bundled model, folder, or hub name.")
@click.option("--layers", help="all (the default), or numbers such as 0,3-5.")
@click.option(
    "--prompts", default=64, show_default=True, type=click.IntRange(1), help="Prompts of each task."
)
@click.option("--corpus", default="stdlib", show_default=True, help="Text of the mean, as for atlas build.")
@click.option("--blocks", default=32, show_default=True, type=click.IntRange(1), help="Blocks of that text.")
@click.option(
    "--top", default=10, show_default=True, type=click.IntRange(1), help="Heads to print of each task."
)
def tasks(
    file: Path | None, model: str, layers: str | None, prompts: int, corpus: str, blocks: int, top: int
) -> None:
    """Zero- and mean-ablate heads on tasks written as templates (seed 001, B9).

    FILE is a TOML file of [[task]] tables (see docs/heads.md); without it the bundled tasks are measured:
    copying a digit, and completing an address.
    """
    from atlas.cli.build import _numbers
    from atlas.cli.display import display
    from atlas.configs import BuildConfig, CorpusConfig, EvalConfig, HeadsConfig, ModelConfig
    from atlas.heads.prompts import BUNDLED, read_tasks
    from atlas.lm.files import find_model, read_shape
    from atlas.pipeline.remeasure import measure_some_tasks

    heads = HeadsConfig(prompts=prompts, task=read_tasks(file or BUNDLED))
    chosen = _chosen(_numbers("layer", layers), read_shape(find_model(model)).n_layers)
    config = BuildConfig(
        model=ModelConfig(model), corpus=CorpusConfig(corpus, blocks + 1), evaluation=EvalConfig(blocks)
    )
    with display("tasks") as progress:
        found = measure_some_tasks(config, heads, chosen, load_settings(), progress)
    _print(found, top)


def _chosen(layers: str | tuple[int, ...] | None, n_layers: int) -> list[int]:
    if layers is None or isinstance(layers, str):
        return list(range(n_layers))
    unknown = [layer for layer in layers if layer >= n_layers]
    if unknown:
        raise ConfigError(f"layer {unknown[0]} does not exist; allowed: 0 to {n_layers - 1}")
    return list(layers)


def _print(found: dict[str, list[dict[str, Any]]], top: int) -> None:
    for task in found["tasks"]:
        click.echo(f"\n{task['task']}: {task['template']}")
        click.echo(f"{task['n_prompts']} prompts such as {task['example']!r}, loss {task['loss']:.3f} nats")
        effects: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
        for row in found["head_task_effects"]:
            if row["task"] == task["task"]:
                effects.setdefault((row["layer"], row["head"]), {})[row["ablation"]] = row
        ordered = sorted(effects, key=lambda at: (-effects[at]["zero"]["effect"], at))
        click.echo("head    zero-ablated (standard error)   mean-ablated")
        for at in ordered[:top]:
            zero, mean = effects[at]["zero"], effects[at]["mean"]
            error = "" if zero["standard_error"] is None else f"({zero['standard_error']:.4f})"
            name = f"L{at[0]}H{at[1]}"
            click.echo(f"{name:<7} {zero['effect']:>+12.4f} {error:<19} {mean['effect']:>+12.4f}")
