"""What the documentation shows is true: configs parse, commands and flags exist, links lead somewhere."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from atlas.cli import COMMANDS, cli
from atlas.configs import BuildConfig
from atlas.pipeline.steps import STEPS
from atlas.plain import from_plain

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf8"), re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "(?:sh|bash|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words[:1] == ["atlas"]:
                    yield pytest.param(words[1:], id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("words", commands())
def test_command_exists_with_these_flags(words):
    cut = next((i for i, word in enumerate(words) if word in ("|", ">", "<", "&&")), len(words))
    context = cli.make_context("atlas", words[:cut], resilient_parsing=False)
    _parse(cli, context)


def _parse(group, context):
    name, command, rest = group.resolve_command(context, context.protected_args + context.args)
    inner = command.make_context(name, list(rest), parent=context)
    if isinstance(command, click.Group):
        _parse(command, inner)


def test_configs_in_the_documentation_are_valid():
    found = [block for page in PAGES for block in blocks(page, "toml")]
    assert found
    for block in found:
        assert isinstance(from_plain(BuildConfig, tomllib.loads(block)), BuildConfig)


def test_every_step_is_described():
    text = (ROOT / "docs" / "build.md").read_text(encoding="utf8")
    for kind in STEPS:
        assert re.search(rf"\| `{kind}[-`]", text), kind


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_is_shown():
    text = "\n".join(page.read_text(encoding="utf8") for page in PAGES)
    for name in COMMANDS:
        assert f"atlas {name}" in text, name
