"""Real servers for tests: a Redis and a PostgreSQL on free loopback ports, gone when the session ends.

Import the fixtures into a test module that needs them: ``from tests.servers import database``.
"""

import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import redis

from atlas.db.engine import close_engines
from atlas.db.schema import upgrade
from atlas.settings import Settings, load_settings
from tests.conftest import need

PATIENCE = 300.0
"""Seconds that a test waits for something which comes at once on a quiet machine."""
_FIRST_PORT, _PORTS = 12_000, 2_000
_given = itertools.count(os.getpid())


def free_port() -> int:
    """A loopback port that nobody listens on; neither the system nor another test process gives it away."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    for number in itertools.islice(_given, _PORTS):
        port = _FIRST_PORT + _PORTS * worker + number % _PORTS
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("no port is free")


def wait_until(
    what: str,
    ready: Callable[[], object],
    seconds: float = PATIENCE,
    process: "subprocess.Popen[bytes] | None" = None,
) -> None:
    """Poll until ``ready()`` is true; fail the test by name when it never is, or ``process`` has ended."""
    end = time.monotonic() + seconds
    while not ready():
        if process is not None and process.poll() is not None:
            pytest.fail(f"{what}: its process ended with {process.returncode}")
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)


@contextmanager
def app_served(home: Path, **environment: str | Callable[[int], str]) -> Iterator[str]:
    """The app as ``atlas app`` serves it, until the block ends; its address.

    What depends on the port is a function of it.
    """
    from atlas.cli.app import streamlit_command

    port = free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("ATLAS_")}
    env |= {"ATLAS_HOME": str(home), "OMP_NUM_THREADS": "1", "ATLAS_QUERY_SECONDS": str(PATIENCE)}
    env |= {key: value(port) if callable(value) else value for key, value in environment.items()}
    with (home / "app.log").open("wb") as log:
        server = subprocess.Popen(streamlit_command(port, "127.0.0.1"), env=env, stdout=log, stderr=log)
        try:
            wait_until("the app answers", lambda: _app_answers(port), process=server)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(server)


def _app_answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=60).status == 200
    except OSError:
        return False


def stop(process: "subprocess.Popen[bytes]", seconds: float = 60) -> None:
    """End a process that a test started, gently first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class RedisServer:
    """A Redis that can be stopped and started again on the same port."""

    def __init__(self, *, keeps: bool = False) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = tempfile.mkdtemp(prefix="atlas-redis-")
        self.keeps = keeps
        """Whether it writes down every message, and has them again after a restart."""

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        options += ["--appendonly", "yes" if self.keeps else "no", "--appendfsync", "always"]
        self.process = subprocess.Popen(
            ["redis-server", *options], cwd=self.folder, stdout=subprocess.DEVNULL
        )
        wait_until("redis answers", self._answers, process=self.process)

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)

    def flush(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def lose(self) -> None:
        """While it is stopped: what it wrote down is gone."""
        shutil.rmtree(Path(self.folder) / "appendonlydir", ignore_errors=True)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Proxy:
    """A network between client and server that can be cut: connections stay, but nothing comes through."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.whole = threading.Event()
        self.whole.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
                self.whole.wait()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.whole.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.whole.clear()

    def mend(self) -> None:
        self.whole.set()

    def close(self) -> None:
        self.mend()
        for end in (self.listener, *self.open):
            end.close()


def _postgres_bin() -> Path | None:
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).parent
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def _unprivileged() -> dict[str, object]:
    """Popen arguments: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


class PostgresServer:
    """A PostgreSQL cluster in a temporary folder; ``database()`` makes a fresh database in it."""

    def __init__(self, bin_folder: Path) -> None:
        self.bin = bin_folder
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="atlas-pg-"))
        self.as_user = _unprivileged()
        self.process: subprocess.Popen[bytes] | None = None
        if self.as_user:
            shutil.chown(self.folder, str(self.as_user["user"]))
        self._run(
            "initdb", "-D", str(self.folder / "data"), "-U", "atlas", "-E", "UTF8", "--auth=trust", "-N"
        )

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, **self.as_user)
        if done.returncode:
            pytest.fail(f"{program}: {done.stderr}")

    def start(self) -> None:
        settings = {
            "fsync": "off",
            "max_connections": "60",
            "shared_buffers": "16MB",
            "unix_socket_directories": "",
            "listen_addresses": "127.0.0.1",
        }
        command = [str(self.bin / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self.as_user)
        wait_until("postgres answers", self._answers, process=self.process)

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def execute(self, statement: str) -> None:
        where = f"host=127.0.0.1 port={self.port} user=atlas dbname=postgres connect_timeout=60"
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute(statement)

    def database(self, template: str | None = None) -> str:
        """The URL of a new database, empty or a copy of another, to which nobody may be connected."""
        name = f"atlas_{uuid4().hex[:12]}"
        like = f" TEMPLATE {template.rpartition('/')[2]}" if template else ""
        self.execute(f"CREATE DATABASE {name}{like}")
        return f"postgresql://atlas:not-shown@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(2)  # fast shutdown: connections are dropped
            stop(self.process)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A running Redis."""
    need(shutil.which("redis-server"), "redis-server")
    server = RedisServer()
    server.start()
    yield server
    server.remove()


@pytest.fixture
def broker(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running PostgreSQL."""
    folder = _postgres_bin()
    need(folder, "postgresql (initdb)")
    assert folder is not None
    server = PostgresServer(folder)
    server.start()
    yield server
    close_engines()
    server.remove()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a database without any table, once on each kind of database."""
    settings = load_settings({"ATLAS_HOME": str(tmp_path / "home")})
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres_server")
        settings = replace(settings, database_url=server.database())
    yield settings
    close_engines()


@pytest.fixture
def database(empty_database: Settings) -> Settings:
    """Settings of a database at the newest schema, once on each kind of database."""
    upgrade(empty_database)
    return empty_database
