"""The compose file and the Dockerfile say what they should; checked without a Docker engine."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from atlas.cli.app import app
from atlas.cli.worker import worker
from atlas.queue import parse_queues
from atlas.settings import load_settings

ROOT = Path(__file__).parent.parent
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
INDEX = "https://wheels.example/cpu"
OURS = ("migrate", "worker", "worker-gpu", "app", "cli")


def filled(text, environment):
    """Fill in ``${NAME:-default}`` and ``${NAME:?message}`` as compose does."""

    def value(match):
        name, kind, rest = match.groups()
        if environment.get(name):
            return environment[name]
        if kind == ":-":
            return rest
        raise KeyError(f"{name}: {rest}")

    return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, text)


def test_the_services_are_there():
    assert set(SERVICES) == {"redis", "postgres", *OURS}
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    assert SERVICES["cli"]["profiles"] == ["cli"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_restarts_and_tells_its_health(name):
    service = SERVICES[name]
    assert service["restart"] == {"migrate": "on-failure", "cli": "no"}.get(name, "unless-stopped")
    if name not in ("migrate", "cli"):
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["image"].split(":")[1] != "latest"


def test_the_cpu_image_asks_for_an_index_of_cpu_wheels():
    """Without one, Linux would get several GB of CUDA; the GPU image wants just that."""
    with pytest.raises(KeyError, match="ATLAS_TORCH_INDEX"):
        filled(COMPOSE, {"ATLAS_DB_PASSWORD": "x7Gk"})
    services = yaml.safe_load(filled(COMPOSE, {"ATLAS_DB_PASSWORD": "x", "ATLAS_TORCH_INDEX": INDEX}))[
        "services"
    ]
    assert services["worker"]["build"]["args"]["TORCH_INDEX"] == INDEX
    assert not services["worker-gpu"]["build"]["args"]["TORCH_INDEX"]


def test_there_is_no_default_password():
    with pytest.raises(KeyError, match="ATLAS_DB_PASSWORD"):
        filled(COMPOSE, {"ATLAS_TORCH_INDEX": INDEX})
    text = filled(COMPOSE, {"ATLAS_DB_PASSWORD": "x7Gk", "ATLAS_TORCH_INDEX": INDEX})
    services = yaml.safe_load(text)["services"]
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"] == "x7Gk"
    assert set(re.findall(r"\$\{ATLAS_DB_PASSWORD(..)", COMPOSE)) == {":?"}


def test_the_settings_are_ones_that_we_read():
    environment = {"ATLAS_DB_PASSWORD": "x7Gk", "ATLAS_TORCH_INDEX": INDEX}
    services = yaml.safe_load(filled(COMPOSE, environment))["services"]
    for name in OURS:
        given = services[name]["environment"]
        settings = load_settings(given)
        assert settings.database_url == "postgresql://atlas:x7Gk@postgres:5432/atlas"
        assert settings.broker_url == "redis://redis:6379/0"
        assert str(settings.home) == "/data"
        assert settings.device == ("cuda" if name == "worker-gpu" else "auto")
        assert "atlas-data:/data" in services[name]["volumes"]


def test_only_the_app_is_reachable_and_only_from_here():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["app"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["app"]["ports"])


def test_everything_waits_for_the_migration():
    for name in ("worker", "worker-gpu", "app", "cli"):
        wanted = SERVICES[name]["depends_on"]
        assert wanted["migrate"]["condition"] == "service_completed_successfully"
        assert wanted["redis"]["condition"] == "service_healthy"
    assert SERVICES["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"


@pytest.mark.parametrize(("name", "command"), [("worker", worker), ("worker-gpu", worker), ("app", app)])
def test_the_commands_take_these_options(name, command):
    text = filled("\n".join(SERVICES[name]["command"]), {}).splitlines()
    assert text[:2] == ["atlas", command.name]
    command.make_context(command.name, text[2:], resilient_parsing=False)
    assert CliRunner().invoke(command, [*text[2:], "--help"]).exit_code == 0
    if "--queues" in text:
        parse_queues(text[text.index("--queues") + 1])


def test_the_image():
    last = DOCKERFILE.split("FROM ")[-1]
    assert re.search(r"^USER atlas$", last, re.MULTILINE)
    assert last.index("USER atlas") < last.index("CMD")
    assert re.search(r'^RUN pip install "torch==.*\$\{TORCH_INDEX:\+--index-url', DOCKERFILE, re.MULTILINE)
    version = re.search(r"TORCH_VERSION=(\S+)", DOCKERFILE).group(1)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = [w for w in wanted if w.startswith("torch>")]
    assert torch.startswith("torch>=" + version.rpartition(".")[0])


def test_the_image_gets_every_package_and_nothing_else():
    copied = set(re.findall(r"^COPY (?!--from)(.+) \./", DOCKERFILE, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names == allowed
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {p.rstrip("*") for p in packages["include"]} <= names
